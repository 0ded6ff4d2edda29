"""Which engine runs a checkpoint that is quantised."""

from collections.abc import Mapping
from pathlib import Path

from raylp import machine
from raylp.errors import UserError
from raylp.models.checkpoint import CARD, count_parameters, quantised_facts, read_card
from raylp.models.load import BYTES_PER_WEIGHT, stored_dtype
from raylp.models.source import fingerprint
from raylp.quantize.schemes import SCHEMES


def quantised(path: Path) -> str | None:
    """The scheme of the checkpoint in `path`, or None where it is not one of raylp's quantised ones.

    Raises:
        UserError: it is one that this raylp does not know.
    """
    scheme = quantised_facts(read_card(path)).get("scheme")
    if scheme not in (None, *SCHEMES):
        raise UserError(f"{path / CARD}: quantised as {scheme!r}, which this raylp does not know: use a newer one")
    return scheme


def engine_of(path: Path) -> str | None:
    """The one engine that runs the checkpoint in `path`, or None where any does."""
    scheme = quantised(path)
    return SCHEMES[scheme].engine if scheme else None


def weights_bytes(path: Path, dtype: str) -> int:
    """What the weights in `path` take in an engine: as they are stored where they are quantised, else in `dtype`."""
    parameters, size = count_parameters(path)
    return size if engine_of(path) else parameters * BYTES_PER_WEIGHT[dtype]


def are_shared(path: Path, dtype: str) -> bool:
    """Whether processes of one machine share the pages of the weights on a CPU: see `load_model`."""
    return engine_of(path) is None and stored_dtype(path) == dtype


def quantization(path: Path) -> dict[str, str]:
    """As vLLM is told of weights that it quantises itself, as it loads them; empty for every other checkpoint."""
    scheme = quantised(path)
    return {"quantization": scheme} if scheme and SCHEMES[scheme].maker == "vllm" else {}


def identity(path: Path) -> str:
    """What translations of the checkpoint are filed under: its fingerprint, and what the engine makes of it."""
    return "|".join([fingerprint(path), *quantization(path).values()])


def check_engine(path: Path, engine: str) -> None:
    """Refuses what cannot work.

    Raises:
        UserError: the checkpoint is quantised in a way that `engine` does not run.
    """
    if (own := engine_of(path)) not in (None, engine):
        raise UserError(
            f"model {path.name}: quantised as {quantised(path)}, which {own} runs and {engine} does not: choose "
            f"backend {own}"
        )


def check_cpu(path: Path) -> None:
    """Refuses what this CPU cannot compute.

    Raises:
        UserError: the checkpoint's scheme needs AVX-512, and there is none.
    """
    scheme = quantised(path)
    if scheme and SCHEMES[scheme].avx512 and not machine.computes_4_bit():
        raise UserError(
            f"model {path.name}: quantised as {scheme}, which vLLM computes with on a CPU only where there is AVX-512, "
            f"and this one has none: take another scheme, or a GPU"
        )


def run_by(engine: str, models: Mapping[str, Path], named: bool) -> dict[str, Path]:
    """Of `models` those that `engine` runs; the others are left out, or refused where they were asked for by name."""
    if named:
        for path in models.values():
            check_engine(path, engine)
    return {name: path for name, path in models.items() if engine_of(path) in (None, engine)}
