"""From the name in a recipe to a directory with a safetensors checkpoint.

A name is a local directory, a hub id, or `package:NAME`: an installed distribution that carries a GGUF file, which is
converted to float32 safetensors once and kept in the cache directory.
"""

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.models.files import CONFIG, check_checkpoint, read_object, weight_files

PACKAGE_PREFIX = "package:"
_NOTICE = re.compile(r"^(licen[cs]e|notice|copying|use_policy)|_terms\b", re.IGNORECASE)
# By model_type, terms that bind whatever is made of the weights. Gemma 4's licence, Apache-2.0, does not.
LICENCES = dict.fromkeys(
    ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma", "vaultgemma"),
    "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
)


def cache_dir() -> Path:
    """Of converted models and hashes: `$RAYLP_CACHE`, else `$XDG_CACHE_HOME/raylp`, else `~/.cache/raylp`."""
    if configured := os.environ.get("RAYLP_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "raylp"


def locate(name: str, revision: str | None = None, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The local directory of the checkpoint called `name`.

    Raises:
        UserError: there is no such model, or it does not have safetensors weights.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _from_package(name.removeprefix(PACKAGE_PREFIX), tell)
    path = Path(name).expanduser()
    if path.is_dir():
        _require_checkpoint(path, name)
        return path.resolve()
    if path.exists() or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"model {name!r} is not there: give a directory with config.json and *.safetensors, a hub id like "
            f"'owner/name', or 'package:NAME' for an installed package with a GGUF file"
        )
    return _from_hub(name, revision)


def fingerprint(path: Path) -> str:
    """SHA-256 over the configuration and weights in `path`, 16 hex digits; remembered by size and time of change."""
    files = sorted([path / CONFIG, *weight_files(path)])
    known = cache_dir() / "fingerprints"
    stamp = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    note = known / hashlib.sha256(stamp.encode()).hexdigest()
    if note.exists():
        return note.read_text()
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    value = digest.hexdigest()[:16]
    known.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(f".{os.getpid()}")
    partial.write_text(value)
    partial.replace(note)
    return value


def licence(path: Path) -> str | None:
    """The licence of the checkpoint in `path`, from its model card or its family; None when neither tells."""
    card = _front_matter(path / "README.md")
    for key in ("license", "license_name"):
        values = card.get(key)
        names = [" ".join(v.split()) for v in (values if isinstance(values, list) else [values]) if isinstance(v, str)]
        if stated := [name for name in names if name not in ("", "other", "unknown")]:
            return ", ".join(stated)
    try:
        return LICENCES.get(str(read_object(path / CONFIG).get("model_type")))
    except UserError:
        return None


def _front_matter(card: Path) -> dict[str, Any]:
    """What a model card says in the YAML at its beginning; nothing where it cannot be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _require_checkpoint(path: Path, name: str) -> None:
    if not (path / CONFIG).exists():
        raise UserError(f"model {name!r}: {path} has no {CONFIG}, so it is not a checkpoint")
    if "auto_map" in read_object(path / CONFIG):
        raise UserError(
            f"model {name!r} wants to run its own code (auto_map in config.json), which raylp never does: "
            f"use a model whose architecture transformers knows"
        )
    check_checkpoint(path)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [
        "*.json",
        "*.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
        "README.md",
        "LICENSE*",
        "NOTICE*",
        "USE_POLICY*",
    ]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns="consolidated*"))
    except RepositoryNotFoundError as error:
        raise UserError(f"model {name!r} is neither a local directory nor on the hub (or it needs a token)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model {name!r} is not in the hub's cache here and could not be fetched: {error}", 1
        ) from error
    _require_checkpoint(path, name)
    return path


def _from_package(package: str, tell: Callable[[str], None]) -> Path:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"model 'package:{package}': that package is not installed: pip install {package}") from error
    key = re.sub(r"[^\w.-]", "-", f"{package}-{distribution.version}-float32")
    target = cache_dir() / "models" / key
    if (target / "raylp-converted").exists():
        return target
    tell(f"converting {package} to safetensors, once, into {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        gguf = _gguf_file(distribution, Path(scratch))
        made = Path(scratch) / "model"
        _convert_apart(package, gguf, made)
        (made / "raylp-converted").write_text(hashlib.sha256(gguf.read_bytes()).hexdigest())
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    tell(f"licence of {package}: {licence(target) or 'not stated, look it up in the package'}")
    return target


def _gguf_file(distribution: importlib.metadata.Distribution, scratch: Path) -> Path:
    """A GGUF file carried whole by the distribution, or put together by its `assemble`, which checks the sum."""
    package = distribution.name
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    module = importlib.import_module(package.replace("-", "_"))
    if not hasattr(module, "assemble"):
        raise UserError(f"model 'package:{package}': it carries no .gguf file and has no assemble()")
    assembled = Path(module.assemble(scratch / "model.gguf"))
    with assembled.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if getattr(module, "EXPECTED_SHA256", found) != found:
        raise UserError(f"model 'package:{package}': the GGUF file's sha256 is {found}, not the published one", 1)
    return assembled


def _convert_apart(package: str, gguf: Path, target: Path) -> None:
    """`convert_gguf` in a process of its own: it takes several times the model's memory, which this one would keep."""
    code = "import sys; from pathlib import Path; from raylp.models.source import convert_gguf as convert"
    command = [sys.executable, "-c", f"{code}; convert(Path(sys.argv[1]), Path(sys.argv[2]))", str(gguf), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = "it was killed, perhaps for want of memory" if done.returncode < 0 else lines[-1]
        raise UserError(f"model 'package:{package}': the GGUF file could not be converted: {said}", 1)


def convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantises a GGUF file to a float32 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    for leftover in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def find_notices(name: str, revision: str | None = None) -> list[Path]:
    """Licence texts and notices that come with the model `name`, where it is on this machine; nothing is fetched."""
    if name.startswith(PACKAGE_PREFIX):
        try:
            files = importlib.metadata.files(name.removeprefix(PACKAGE_PREFIX)) or []
        except importlib.metadata.PackageNotFoundError:
            return []
        found = [Path(str(file.locate())) for file in files]
    else:
        place = find_fetched(name, revision)
        found = list(place.iterdir()) if place else []
    return sorted(file for file in found if _NOTICE.search(file.name) and file.is_file())


def find_fetched(name: str, revision: str | None = None) -> Path | None:
    """The checkpoint `name` where it is on this machine, as a directory or in the hub's cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name and Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
