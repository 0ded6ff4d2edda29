"""Cut a model and save it as a stock checkpoint, with how it was made beside the weights (`raylp.json`)."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.models.files import CARD, checkpoint_files, files_beside, safetensors_header, weight_files
from raylp.models.load import read_config
from raylp.models.view import without_layers

_INDEXED = re.compile(r"^(.*?)\.(\d+)\.")
_NOT_TEXT = ("vision", "visual", "audio", "image")
_ROUTERS = (".gate.", ".router.")


def save_checkpoint(model: Any, source: Path, target: Path, card: dict[str, Any], removed: Iterable[int] = ()) -> None:
    """Writes `model` without the layers `removed` to `target`; tokenizer and the like are copied from `source`.

    The weights are saved from inside the view, so that names, configuration and numbering are the view's own; tied
    weights are stored once.
    """
    target.mkdir(parents=True, exist_ok=True)
    with without_layers(model, removed):
        model.save_pretrained(target)
    copy_beside_weights(source, target)
    write_card(target, card)


def write_card(path: Path, card: dict[str, Any]) -> None:
    """`raylp.json` in `path`."""
    (path / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_beside_weights(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation and processor configuration: all that is not weights or config.json."""
    for file in files_beside(source):
        shutil.copyfile(file, target / file.name)


def copy_checkpoint(source: Path, target: Path, link: bool = False) -> None:
    """The files that a checkpoint needs, without raylp's card; with `link`, none takes its room twice where both are on
    one disk.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in checkpoint_files(source):
        try:
            (os.link if link else shutil.copyfile)(file.resolve(), target / file.name)
        except OSError:
            if not link:
                raise
            shutil.copyfile(file, target / file.name)


def read_card(path: Path) -> dict[str, Any] | None:
    """What `raylp.json` in `path` says, or None for a checkpoint that is not raylp's."""
    card = path / CARD
    if not card.exists():
        return None
    try:
        return json.loads(card.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{card} is not JSON: {error}") from error


def quantised_facts(card: dict[str, Any] | None) -> dict[str, Any]:
    """Of a checkpoint's card, how it was quantised (scheme, bits, params, ...); empty where it was not."""
    return (card or {}).get("quantized") or {}


def count_parameters(path: Path) -> tuple[int, int]:
    """Parameters and bytes of weights in `path`, from the files' headers; tied weights are stored and counted once."""
    parameters = size = 0
    for file in weight_files(path):
        for tensor in safetensors_header(file).values():
            count = 1
            for length in tensor["shape"]:
                count *= length
            parameters += count
            start, end = tensor["data_offsets"]
            size += end - start
    return parameters, size


@dataclass(frozen=True)
class Tensors:
    """The weights of a checkpoint by their place: safetensors' entries, by name.

    `layers`: of each decoder layer; `rest`: of the decoder outside them; `other`: of parts that are not text.
    """

    layers: list[dict[str, Any]]
    rest: dict[str, Any]
    other: dict[str, Any]


@dataclass(frozen=True)
class Costs:
    """What each layer holds, and what the model holds besides: parameters and bytes, in the original's order.

    `step` and `step_rest`: numbers one decoding step reads in each layer and besides (the vocabulary's projection),
    which the latency of a step is taken to go with.
    """

    parameters: tuple[int, ...]
    parameters_rest: int
    bytes: tuple[int, ...]
    bytes_rest: int
    step: tuple[int, ...]
    step_rest: int


def read_tensors(path: Path) -> Tensors:
    """What the files' headers in `path` say of the weights.

    Raises:
        UserError: they show no list of as many layers as the configuration says.
    """
    entries = _entries(path)
    other = {name: entry for name, entry in entries.items() if not _is_text(name)}
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for name, entry in entries.items():
        if name not in other and (match := _INDEXED.match(name)):
            groups.setdefault(match.group(1), {}).setdefault(int(match.group(2)), {})[name] = entry
    stacks = [group for group in groups.values() if len(group) == stack_size(path)]
    if len(stacks) != 1:
        raise UserError(f"model {path}: {len(stacks)} lists of {stack_size(path)} layers in its tensors")
    inside = {name for layer in stacks[0].values() for name in layer}
    rest = {name: entry for name, entry in entries.items() if name not in inside and name not in other}
    return Tensors([stacks[0][i] for i in sorted(stacks[0])], rest, other)


def numbered_tensors(path: Path) -> dict[str, Any]:
    """safetensors' entries of everything that is text and stands in a list, such as layers; nothing is checked."""
    return {name: entry for name, entry in _entries(path).items() if _INDEXED.match(name) and _is_text(name)}


def _entries(path: Path) -> dict[str, Any]:
    """What the headers of all files say, by tensor."""
    entries: dict[str, Any] = {}
    for file in weight_files(path):
        entries |= safetensors_header(file)
    return entries


def _is_text(name: str) -> bool:
    """Whether a tensor is of the part that reads and writes text."""
    return not any(mark in name for mark in _NOT_TEXT)


def is_expert(name: str) -> bool:
    """Whether a tensor of this name belongs to the experts of a mixture."""
    return ".experts." in name


def is_router(name: str) -> bool:
    """Whether a tensor of this name belongs to what chooses among the experts of a mixture."""
    return any(mark in name for mark in _ROUTERS)


def vocabulary_size(tensors: Tensors, config: Any) -> int:
    """Numbers in the projection to the vocabulary, which a tied embedding serves as."""
    tables = [entry["shape"] for entry in tensors.rest.values() if len(entry["shape"]) == 2]
    wanted = [s for s in tables if max(s) >= config.vocab_size and min(s) == config.hidden_size]
    return max(map(math.prod, wanted), default=0)


def layer_costs(path: Path) -> Costs:
    """What each layer of the checkpoint in `path` takes, and the rest: parameters, bytes, numbers a step reads."""
    tensors = read_tensors(path)

    def parameters(entries: dict[str, Any]) -> int:
        return sum(math.prod(entry["shape"]) for entry in entries.values())

    def size(entries: dict[str, Any]) -> int:
        return sum(end - start for start, end in (entry["data_offsets"] for entry in entries.values()))

    outside = tensors.rest | tensors.other
    each = tuple(map(parameters, tensors.layers))
    vocabulary = vocabulary_size(tensors, read_config(path).get_text_config(decoder=True))
    return Costs(each, parameters(outside), tuple(map(size, tensors.layers)), size(outside), each, vocabulary)


def stack_size(path: Path) -> int:
    """Decoder layers of the checkpoint in `path`, from its configuration."""
    return int(read_config(path).get_text_config(decoder=True).num_hidden_layers)


def quantised_layers(path: Path) -> int:
    """How many linear layers of the checkpoint in `path` are quantised: each has scales beside its weights."""
    marks = (".weight_scale", ".SCB", ".weight.absmax")
    return sum(name.endswith(marks) for name in _entries(path))


def sizes(path: Path) -> dict[str, int]:
    """`layers`, `params` and `bytes` of the checkpoint in `path`, as results.json has them.

    A quantised one has the parameters of the model it was made from.
    """
    parameters, size = count_parameters(path)
    parameters = quantised_facts(read_card(path)).get("params", parameters)
    return {"layers": stack_size(path), "params": parameters, "bytes": size}


def card_for(
    base_model: str, fingerprint: str, stack: str, removed: list[int], prompt: dict[str, Any]
) -> dict[str, Any]:
    """The contents of `raylp.json`: `removed` in the base model's indices, in order of removal."""
    return {
        "schema": 1,
        "base_model": base_model,
        "base_fingerprint": fingerprint,
        "stack": stack,
        "removed": removed,
        "prompt": prompt,
    }
