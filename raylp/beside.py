"""Libraries whose pins differ from the stack's: each in an environment of its own beside it, used as a process."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raylp.errors import UserError


@dataclass(frozen=True)
class Beside:
    """`name`: of the make target, and of the directory after `.venv-`; `package`: as its metadata has it; `variable`:
    of the environment, names another interpreter; `needs`: who needs it, to say when it is not there.
    """

    name: str
    package: str
    variable: str
    needs: str

    def python(self, env: Mapping[str, str] = os.environ) -> Path:
        """The interpreter: as the variable says, or beside the environment or project."""
        if given := env.get(self.variable):
            return Path(given)
        places = [Path(sys.prefix).parent, Path(__file__).parents[1]]
        interpreters = [place / f".venv-{self.name}/bin/python" for place in places]
        return next((python for python in interpreters if python.exists()), interpreters[0])

    def version(self, python: Path) -> str | None:
        """The version beside `python`, from its metadata; None where it is not installed."""
        found = next(python.parent.parent.glob(f"lib/python3*/site-packages/{self.package}-*.dist-info"), None)
        return found.name.removesuffix(".dist-info").partition("-")[2] if found else None

    def require(self) -> tuple[Path, str]:
        """The interpreter and the version.

        Raises:
            UserError: there is no such environment.
        """
        python = self.python()
        version = self.version(python) if python.exists() else None
        if version is None:
            package = self.package.replace("_", "-")
            what = f"{python} has no {package}" if python.exists() else f"{python} is not there"
            raise UserError(f"{self.needs} an environment of its own, and {what}: run make {self.name}")
        return python, version


COMET = Beside("comet", "unbabel_comet", "RAYLP_COMET_PYTHON", "COMET needs")
COMPRESSOR = Beside("quantize", "llmcompressor", "RAYLP_QUANTIZE_PYTHON", "w8a8, gptq, awq and fp8 need")
