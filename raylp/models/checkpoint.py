"""Cut a model and save it as a stock checkpoint, with how it was made beside the weights (`raylp.json`)."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.models.load import read_config, safetensors_header
from raylp.models.view import without_layers

CARD = "raylp.json"
_WRITTEN_BY_SAVE = ("config.json", "model.safetensors.index.json", CARD, "manifest.json")
_BESIDE_WEIGHTS = ("*.json", "*.model", "*.jinja", "*.txt")


def save_checkpoint(model: Any, source: Path, target: Path, card: dict[str, Any], removed: Iterable[int] = ()) -> None:
    """Writes `model` without the layers `removed` to `target`; tokenizer and the like are copied from `source`.

    The weights are saved from inside the view, so that names, configuration and numbering are the view's own; tied
    weights are stored once.
    """
    target.mkdir(parents=True, exist_ok=True)
    with without_layers(model, removed):
        model.save_pretrained(target)
    copy_beside_weights(source, target)
    (target / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def copy_beside_weights(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation and processor configuration: all that is not weights or config.json."""
    for pattern in _BESIDE_WEIGHTS:
        for file in source.glob(pattern):
            if file.name not in _WRITTEN_BY_SAVE:
                shutil.copyfile(file, target / file.name)


def read_card(path: Path) -> dict[str, Any] | None:
    """What `raylp.json` in `path` says, or None for a checkpoint that is not raylp's."""
    card = path / CARD
    if not card.exists():
        return None
    try:
        return json.loads(card.read_text())
    except ValueError as error:
        raise UserError(f"{card} is not JSON: {error}") from error


def count_parameters(path: Path) -> tuple[int, int]:
    """Parameters and bytes of weights in `path`, from the files' headers; tied weights are stored and counted once."""
    parameters = size = 0
    for file in path.glob("*.safetensors"):
        for tensor in safetensors_header(file).values():
            count = 1
            for length in tensor["shape"]:
                count *= length
            parameters += count
            start, end = tensor["data_offsets"]
            size += end - start
    return parameters, size


def stack_size(path: Path) -> int:
    """Decoder layers of the checkpoint in `path`, from its configuration."""
    return int(read_config(path).get_text_config(decoder=True).num_hidden_layers)


def sizes(path: Path) -> dict[str, int]:
    """`layers`, `params` and `bytes` of the checkpoint in `path`, as results.json has them."""
    parameters, size = count_parameters(path)
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
