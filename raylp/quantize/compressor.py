"""Where llm-compressor is: its pins differ from the stack's, so it lives in an environment of its own."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from raylp.errors import UserError


def compressor_python(env: Mapping[str, str] = os.environ) -> Path:
    """The interpreter of llm-compressor's environment: RAYLP_QUANTIZE_PYTHON, or .venv-quantize beside the environment
    or project.
    """
    if given := env.get("RAYLP_QUANTIZE_PYTHON"):
        return Path(given)
    places = [Path(sys.prefix).parent, Path(__file__).parents[2]]
    interpreters = [place / ".venv-quantize/bin/python" for place in places]
    return next((python for python in interpreters if python.exists()), interpreters[0])


def compressor_version(python: Path) -> str | None:
    """The version of llm-compressor beside `python`, from its metadata; None where it is not installed."""
    found = next(python.parent.parent.glob("lib/python3*/site-packages/llmcompressor-*.dist-info"), None)
    return found.name.removesuffix(".dist-info").partition("-")[2] if found else None


def require_compressor() -> tuple[Path, str]:
    """The interpreter of llm-compressor's environment and its version.

    Raises:
        UserError: there is no such environment.
    """
    python = compressor_python()
    version = compressor_version(python) if python.exists() else None
    if version is None:
        what = f"{python} has no llmcompressor" if python.exists() else f"{python} is not there"
        raise UserError(f"w8a8, gptq, awq and fp8 need an environment of their own, and {what}: run make quantize")
    return python, version
