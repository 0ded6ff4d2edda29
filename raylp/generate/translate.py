"""One line in, one line out, with a checkpoint alone: no run, no Ray."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from raylp.data.languages import split_pair
from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.generate.base import Generator, Output, Request, StopRule, stop_rule
from raylp.models.checkpoint import CARD, read_card
from raylp.models.files import check_checkpoint
from raylp.models.load import (
    load_model,
    load_tokenizer,
    max_positions,
    read_config,
    read_generation_config,
    stored_dtype,
)
from raylp.quantize.engines import check_engine, engine_of

VLLM_ROOM = 8192  # tokens of a line with its prompt and translation: vLLM sets memory aside for the longest


def translate(
    model_path: Path,
    pair: str,
    lines: Iterable[str],
    out: TextIO,
    *,
    backend: str = "transformers",
    batch_size: int = 16,
    dtype: str = "auto",
) -> None:
    """Writes the translation of each of `lines` to `out`: one line for each, in order, a blank one for a blank one.

    The prompt is the one beside the weights (`raylp.json`), or the default for a stock checkpoint. Lines are taken and
    answered `batch_size` at a time. A line too long for the model (in vLLM, for `VLLM_ROOM` tokens) is cut, with a
    warning on stderr.

    Raises:
        UserError: no whole checkpoint is at `model_path`, or `pair` is not a language pair.
    """
    split_pair(pair)
    if backend == "auto":
        backend = engine_of(model_path) or quickest_backend()
    if not (model_path / "config.json").exists():
        raise UserError(f"model {model_path}: no checkpoint is there (config.json and *.safetensors in a directory)")
    check_checkpoint(model_path)
    check_engine(model_path, backend)
    prompt = read_prompt(model_path)
    tokenizer = load_tokenizer(model_path)
    room = max_positions(model_path) or 2**31
    if backend == "vllm":
        room = min(room, VLLM_ROOM)
    generator: Generator | None = None
    for first, batch in _batches(lines, batch_size):
        fitted = [
            (place, _fit_line(tokenizer, prompt, line, pair, room, first + place))
            for place, line in enumerate(batch)
            if line
        ]
        if fitted and generator is None:
            generator = _generator(model_path, backend, dtype, prompt.newline, batch_size, room)
        outputs: dict[int, Output] = {}
        if fitted and generator is not None:
            made = generator.generate([request for _, request in fitted])
            outputs = {place: output for (place, _), output in zip(fitted, made, strict=True)}
        for place in range(len(batch)):
            out.write((outputs[place].text if place in outputs else "") + "\n")
        out.flush()


def quickest_backend() -> str:
    """vllm where there is a GPU and vllm is installed, else transformers, which starts at once."""
    import torch

    return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"


def read_prompt(model_path: Path) -> Prompt:
    """The prompt kept beside the weights; the default where there is none.

    Raises:
        UserError: what is kept there is not a prompt.
    """
    card = read_card(model_path)
    if card is None:
        return Prompt()
    try:
        return Prompt.model_validate(card["prompt"])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{model_path / CARD}: its prompt cannot be read: {error}") from error


@dataclass(frozen=True)
class Fitted:
    """`kept`: characters of the source that are asked about; `cut`: whether that is not all of it."""

    request: Request
    kept: int
    cut: bool


def fit(tokenizer: Any, prompt: Prompt, source: str, pair: str, room: int) -> Fitted:
    """The request for `source`, cut at the end until prompt and translation fit into `room` tokens.

    Raises:
        UserError: the prompt alone does not fit.
    """
    request = _request(tokenizer, prompt, source, pair)
    if len(request.tokens) + request.max_new_tokens <= room:
        return Fitted(request, len(source), False)
    low, high = 0, len(source)
    # The longest beginning that fits: its length in characters, by bisection.
    while low < high:
        middle = (low + high + 1) // 2
        request = _request(tokenizer, prompt, source[:middle], pair)
        low, high = (middle, high) if len(request.tokens) + request.max_new_tokens <= room else (low, middle - 1)
    if low == 0:
        raise UserError(
            f"the prompt alone leaves no room in the model's {room} tokens; use fewer examples, or backend transformers"
        )
    kept = source[:low].rpartition(" ")[0] or source[:low]
    return Fitted(_request(tokenizer, prompt, kept, pair), len(kept), True)


def _fit_line(tokenizer: Any, prompt: Prompt, line: str, pair: str, room: int, number: int) -> Request:
    """The request for line `number`; what is cut is said on stderr."""
    try:
        fitted = fit(tokenizer, prompt, line, pair, room)
    except UserError as error:
        raise UserError(f"line {number}: {error}") from error
    if fitted.cut:
        print(
            f"line {number}: {len(line)} characters are more than the model's {room} tokens allow; the first "
            f"{fitted.kept} are translated",
            file=sys.stderr,
        )
    return fitted.request


def _request(tokenizer: Any, prompt: Prompt, source: str, pair: str) -> Request:
    (request,) = prompt.requests(tokenizer, [(source, pair)])
    return request


def read_stop_rule(path: Path, tokenizer: Any, newline: bool = True) -> StopRule:
    """What ends a translation by the model in `path`, which has that tokenizer; see `stop_rule`."""
    configs = [read_config(path).get_text_config(decoder=True), read_generation_config(path)]
    return stop_rule(tokenizer, configs, newline)


def one_line(text: str) -> str:
    """The text without blanks around it; a line break inside it, of any kind, becomes a blank."""
    return " ".join(text.splitlines()).strip()


def _batches(lines: Iterable[str], size: int) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, from 1; lines), each by `one_line`."""
    taken = iter(lines)
    for start in itertools.count(1, size):
        batch = [one_line(line) for line in itertools.islice(taken, size)]
        if not batch:
            return
        yield start, batch


def _generator(path: Path, backend: str, dtype: str, newline: bool, batch_size: int, room: int) -> Generator:
    import torch

    gpu = torch.cuda.is_available()
    if dtype == "auto":
        # What vLLM alone runs is quantised, and served in bfloat16.
        dtype = "bfloat16" if engine_of(path) == "vllm" else stored_dtype(path) if gpu else "float32"
    if backend == "vllm":
        from raylp.generate.vllm_engine import VLLMGenerator

        return VLLMGenerator(path, dtype, newline=newline, max_model_len=room)
    from raylp.generate.transformers_view import TransformersGenerator

    model = load_model(path, dtype, "cuda" if gpu else "cpu")
    return TransformersGenerator(model, load_tokenizer(path), newline, batch_size)
