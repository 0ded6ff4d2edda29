"""What healing brings back: one run for each way to heal, and their table.

    python benchmarks/healing.py --data DIR --pair en-de --out runs/healing

DIR holds a folder for each pair with train.jsonl, dev.jsonl and test.jsonl; the first two thirds of dev, by page, are
searched on, the rest tells when to stop healing. Sentences of more than `--max-words` are left out, but for the test
set. The recipes are recipes/healing/*.yaml, with what a variant changes. Every run is a run directory under
--out/PAIR: what is done is not done again, so it may be stopped at any time. `controls`: at the smallest depth, the
layers of the tail, of the middle and three random draws, healed as `--like` was, and the searched layers' difference to
each, with its interval. --given 2,13,9,16: an earlier search's layers, in its order, instead of a search. --only-new:
nothing that the other variants have too, such as the pruned models, and no baseline healed alike. --wide: the pages of
train that nothing is learned from are tested on too, for narrower intervals (another --out). --results: a file for the
table.
"""

import argparse
import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from raylp.evaluate.compare import compare, find_entrant
from raylp.names import REPAIRED
from raylp.pipeline import run
from raylp.progress import Reporter
from raylp.recipe import load_recipe
from raylp.rundir import RunDir

RECIPES = Path(__file__).parents[1] / "recipes" / "healing"
SPLITS = ("train", "dev", "test")
TOKEN_LEVEL = ("heal.loss.distillation=1", "heal.loss.cross_entropy=0.5")
# About as many steps each: two epochs of one kind of data, one of both.
VARIANTS: dict[str, tuple[str, ...]] = {
    "authentic": ("heal.data=authentic", "heal.epochs=2", "distill=false"),
    "both": (),
    "token": ("heal.data=authentic", "heal.epochs=2", "distill=false", *TOKEN_LEVEL),
    "teacher": ("heal.data=teacher", "heal.epochs=2"),
    "repaired": ("heal=false", "distill=false", "repair={methods: [compensate, merge, concatenate]}"),
}
HEALED_ONLY = ("heal.baseline=false", "evaluate={models: [healed]}")
DRAWS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pair", default="en-de")
    parser.add_argument("--out", type=Path, default=Path("runs/healing"))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--like", default="authentic", help="the variant that controls are healed as; '' for none")
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--max-words", type=int, default=60)
    parser.add_argument("--given", metavar="LAYERS", help="layers that go, in order, instead of a search")
    parser.add_argument("--only-new", action="store_true")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe")
    parser.add_argument("--results", type=Path, help="a file that the table so far is written to")
    given = parser.parse_args()
    variants = [name for name in given.variants.split(",") if name]
    given.first = given.like or variants[0]  # whose scores the others take over
    out = given.out.resolve() / given.pair
    text = cut(given.data / given.pair, out / "text", given.max_words, given.train if given.wide else None)
    adapted = make(given, out, text, "adapt", "adapted")
    assert adapted.complete("models/adapted")
    runs: list[tuple[str, RunDir]] = []
    differences: list[tuple[str, str]] = []

    def add(name: str, *changes: str) -> None:
        runs.append((name, make(given, out, text, "heal", name, *changes)))
        show(runs, differences, given.results)

    if given.like:
        add(given.like, *VARIANTS[given.like])
        plan = runs[0][1].read_json("plan.json")
        searched = f"{out / given.like}:healed-{plan['num_layers'] - len(plan['removed'])}"
        for name, layers in controls(plan["num_layers"], len(plan["removed"])).items():
            add(name, *VARIANTS[given.like], *HEALED_ONLY, f"search={{given: {layers}}}")
            differences.append((f"searched - {name} {layers}", difference(searched, str(out / name))))
    for variant in variants:
        if variant != given.like:
            add(variant, *VARIANTS[variant], *(only_new(variant) if given.only_new else ()))
    show(runs, differences, given.results)


def cut(source: Path, target: Path, max_words: int, train: int | None = None) -> Path:
    """The files of the splits in `target`, made once. `train`: train has so many, the pages behind them go to test."""
    target = target.with_name(f"{target.name}-{max_words}" + (f"-{train}" if train else ""))
    if not target.exists():
        lines = {split: (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines() for split in SPLITS}
        ends = itertools.accumulate(len(list(page)) for _, page in itertools.groupby(lines["dev"], page_of))
        end = next(end for end in ends if end >= len(lines["dev"]) * 2 / 3)
        lines |= {"search": lines["dev"][:end], "dev": lines["dev"][end:]}
        for split in ("search", "train", "dev"):
            lines[split] = [line for line in lines[split] if len(json.loads(line)["source"].split()) <= max_words]
        if train:
            learned = {page_of(line) for line in lines["train"][:train]}
            lines["test"] += [line for line in lines["train"] if page_of(line) not in learned]
            lines["train"] = lines["train"][:train]
        partial = target.with_name(f".{target.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for split, kept in lines.items():
            (partial / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.rename(target)
    return target


def page_of(line: str) -> str:
    """Of a pair's id, the page that it comes from."""
    return json.loads(line)["id"].split(":")[0]


def make(given: argparse.Namespace, out: Path, text: Path, recipe: str, name: str, *changes: str) -> RunDir:
    """The run `name`, done."""
    content = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    splits = [key for key in content["data"]["en-de"] if key != "limit"]
    data: dict[str, Any] = {split: str(text / f"{split}.jsonl") for split in splits} | {"limit": {"train": given.train}}
    overrides = [f"data={json.dumps({given.pair: data})}", f"run_dir={out / name}"]
    if recipe == "heal":
        overrides += [f"model={out / 'adapted' / 'models' / 'adapted'}", f"cache={out / given.first}"]
        if given.given:
            overrides.append(f"search.given=[{given.given}]")
    return run(load_recipe(RECIPES / f"{recipe}.yaml", [*overrides, *changes, *given.set]), Reporter())


def controls(num_layers: int, count: int) -> dict[str, list[int]]:
    """Layers to leave out instead of the searched ones, never the first or the last."""
    inner = list(range(1, num_layers - 1))
    start = (num_layers - count) // 2
    found = {"tail": inner[-count:], "middle": list(range(start, start + count))}
    for draw in range(DRAWS):
        found[f"random-{draw + 1}"] = sorted(random.Random(draw).sample(inner, count))
    return found


def only_new(variant: str) -> list[str]:
    """Changes that leave out of a variant what the others have too."""
    kinds = list(REPAIRED.values()) if variant == "repaired" else ["healed"]
    depths = yaml.safe_load((RECIPES / "heal.yaml").read_text())["search"]["layers"]
    models = [f"{kind}-{depth}" for depth in depths for kind in kinds]
    changes = [f"evaluate={{models: {json.dumps(models)}}}"]
    return changes if variant == "repaired" else ["heal.baseline=false", *changes]


def difference(a: str, b: str) -> str:
    """chrF2++ of model `a` less that of `b` (RUN:MODEL, or a run with one healed model), with its interval."""
    found = {metric: standings for (_, metric), standings in compare([find_entrant(b), find_entrant(a)]).items()}
    gap = found["chrF2++"][1]
    assert gap.difference is not None
    return f"{gap.difference.value:+.1f} ({gap.difference.low:+.1f} to {gap.difference.high:+.1f})"


def show(runs: list[tuple[str, RunDir]], differences: list[tuple[str, str]], results: Path | None) -> None:
    """Every model of every run, with its share of the baseline healed alike in the same run; printed, and written."""
    table = Table("run", "model", "chrF2++", "95%", "of baseline-healed", "steps", "seconds")
    for name, rundir in runs:
        models: dict[str, Any] = {m["name"]: m for m in rundir.read_json("results.json")["models"]}
        scores = {model: next(iter(entry["scores"].values()))["chrF2++"] for model, entry in models.items()}
        whole = scores.get("baseline-healed")
        for model, score in scores.items():
            share = f"{score['value'] / whole['value']:.1%}" if whole else ""
            log = f"heal/{model}.json"
            record = rundir.read_json(log) if rundir.exists(log) else {}
            span = f"{score['low']:.1f} to {score['high']:.1f}"
            took = [str(record["steps"]), f"{record['seconds']:.0f}"] if record else ["", ""]
            table.add_row(name, model, f"{score['value']:.1f}", span, share, *took)
        table.add_section()
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table)
    for what, gap in differences:
        console.print(f"{what}: {gap}", highlight=False)
    text = console.export_text()
    print(text, flush=True)
    if results is not None:
        results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
