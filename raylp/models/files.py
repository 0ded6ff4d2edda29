"""Which files of a directory make a checkpoint, and what the headers of its weights say."""

import json
from pathlib import Path
from typing import Any

from raylp.errors import UserError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "raylp.json"
MANIFEST = "manifest.json"
# Tokenizer, chat template, generation and processor configuration.
_BESIDE = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt", "dict.txt")
# Of weights, of this program, and of Mistral's own format, which repeats config.json.
_NOT_BESIDE = (CONFIG, "*.index.json", CARD, MANIFEST, "params.json")
_POINTER = b"version https://git-lfs"


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of the checkpoint in `path`, as transformers reads them: one, or those its index
    names. Others are none of it, such as the same weights in another format.

    Raises:
        UserError: there are none, or the index is broken or names a file that is not there.
    """
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if not (path / INDEX).exists():
        raise UserError(
            f"model {path}: it has no {WEIGHTS} and no {INDEX}; other formats can run code and are not read"
        )
    listed = read_object(path / INDEX).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{path / INDEX} does not list the model's files under weight_map: copy or download it again")
    if missing := [name for name in names if not (path / name).exists()]:
        raise UserError(
            f"model {path}: {', '.join(missing[:3])} of {INDEX} {'is' if len(missing) == 1 else 'are'} not there: copy "
            f"or download all of the model"
        )
    return [path / name for name in names]


def files_beside(path: Path) -> list[Path]:
    """The files of the checkpoint in `path` that are neither weights nor config.json."""
    found = {file for pattern in _BESIDE for file in path.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not any(file.match(pattern) for pattern in _NOT_BESIDE))


def checkpoint_files(path: Path) -> list[Path]:
    """All files that the checkpoint in `path` needs, and no other.

    Raises:
        UserError: as `weight_files`.
    """
    weights = weight_files(path)
    index = [path / INDEX] if weights != [path / WEIGHTS] else []
    return [path / CONFIG, *index, *weights, *files_beside(path)]


def may_think(path: Path) -> bool:
    """Whether the chat template of the model in `path` asks if it may think before it answers (Qwen3 and its like)."""
    files = (path / "chat_template.jinja", path / "tokenizer_config.json")
    return any("enable_thinking" in file.read_text(encoding="utf-8") for file in files if file.exists())


def check_checkpoint(path: Path) -> None:
    """Reads the beginnings of all files of the checkpoint in `path`.

    Raises:
        UserError: config.json or weights are not there, or one of the files is broken or a pointer of git-lfs.
    """
    read_object(path / CONFIG)
    for file in files_beside(path):
        _refuse_pointer(file)
    for file in weight_files(path):
        safetensors_header(file)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        UserError: it is not there, or not that.
    """
    try:
        _refuse_pointer(file)
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: copy or download it again")
    return content


def safetensors_header(file: Path) -> dict[str, Any]:
    """Name, shape, dtype and place of every tensor in a safetensors file, read from its first bytes only.

    Raises:
        UserError: the file is cut short or otherwise broken, or a pointer of git-lfs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _refuse_pointer(file)
        with safe_open(file, "np"):  # checks header and length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}): copy or download it again") from error
    header.pop("__metadata__", None)
    return header


def _refuse_pointer(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if is_pointer:
        raise UserError(f"{file} is a pointer of git-lfs and not the file itself: run `git lfs pull` in {file.parent}")
