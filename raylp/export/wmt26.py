"""The directory that WMT26's model compression task runs: `setup.sh`, `run.sh`, `compress.sh`, `workdir/model`.

raylp's own source goes along, so that what translates there is what was measured; only what translating needs is
installed.
"""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from packaging.requirements import Requirement

import raylp
from raylp.data.languages import split_pair
from raylp.errors import UserError
from raylp.export.card import ModelFacts, scheme_of
from raylp.export.portable import Portable
from raylp.generate.translate import VLLM_ROOM
from raylp.rundir import RunDir

# What `raylp translate` imports. vllm is installed where there is a GPU.
NEEDED = ("numpy", "pydantic", "pyyaml", "safetensors", "torch", "transformers", "typer")
FOR_BITS = ("accelerate", "bitsandbytes")  # and for models that bitsandbytes has quantised
SCRIPTS = ("setup.sh", "run.sh", "compress.sh")
# The task's codes, and those that a run may name the same languages by.
CODES = {
    "ces": "cs",
    "deu": "de",
    "eng": "en",
    "zho": "zh",
    "zho_Hans": "zh",
    "zh_Hans": "zh",
    "zh_CN": "zh",
    "ara_EG": "arz",
    "ar_EG": "arz",
    "ar": "arz",
    "ara": "arz",
}


def write_submission(rundir: RunDir, facts: ModelFacts, target: Path) -> None:
    """Everything but `workdir/model`, which is there already."""
    environment = Environment(
        loader=PackageLoader("raylp.export"), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    scheme = scheme_of(facts)
    portable = Portable()
    recipe = portable.recipe(facts.contents.recipe_text)
    values: dict[str, Any] = {
        "facts": facts,
        "engine": scheme.engine if scheme else None,
        "pairs": spellings(facts.pairs),
        "raylp": raylp.__version__,
        "torch": _version("torch"),
        "vllm": _vllm(),
        "vllm_room": f"{VLLM_ROOM:,}",
        "beside": portable.needed,
        "planned": rundir.exists("plan.json"),
    }
    for script in SCRIPTS:
        file = target / script
        file.write_text(environment.get_template(f"{script}.jinja").render(values), encoding="utf-8")
        file.chmod(0o755)
    (target / "README.md").write_text(environment.get_template("wmt26.md.jinja").render(values), encoding="utf-8")
    needed = (*NEEDED, *(FOR_BITS if scheme and scheme.maker == "bitsandbytes" else ()))
    lines = [f"{name}=={_version(name)}" for name in needed if name != "torch"]
    (target / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    package = Path(raylp.__file__).parent
    shutil.copytree(package, target / "workdir" / "code" / "raylp", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "workdir" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    if values["planned"]:
        plan = {**portable.plan(rundir.read_json("plan.json")), "model": facts.cut_from}
        text = json.dumps(plan, indent=2, ensure_ascii=False)
        (target / "workdir" / "plan.json").write_text(text + "\n", encoding="utf-8")


def spellings(pairs: tuple[str, ...]) -> dict[str, str]:
    """Every way to write the pairs of a run, to the run's own: {"ces-deu": "cs-de", "cs-de": "cs-de"}.

    Raises:
        UserError: two pairs share a spelling that is neither's own.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        first, second = ({own, *_alike(own)} for own in split_pair(pair))
        for spelling in (f"{a}-{b}" for a in sorted(first) for b in sorted(second)):
            if found.setdefault(spelling, pair) != pair and spelling not in pairs:
                raise UserError(f"pairs {found[spelling]} and {pair} of the run may both be written {spelling}")
    return found | {pair: pair for pair in pairs}


def _alike(code: str) -> set[str]:
    short = CODES.get(code, code)
    return {short, *(other for other, means in CODES.items() if means == short)}


def _vllm() -> str:
    """The version of vllm that fits this torch: as raylp itself requires it."""
    for line in importlib.metadata.requires("raylp") or []:
        wanted = Requirement(line)
        if wanted.name == "vllm":
            return str(wanted.specifier).removeprefix("==")
    raise UserError("raylp's own requirements name no vllm: install it with pip, as its README says", 1)


def _version(name: str) -> str:
    """Of an installed package."""
    return importlib.metadata.version(name).partition("+")[0]
