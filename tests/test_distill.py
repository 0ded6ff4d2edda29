"""Teacher data: what is fit to learn from, and translating through Ray Data and vLLM without losing a row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import toy
from conftest import toy_recipe

from raylp.context import Context, Splits
from raylp.data.corpus import Pair, read_pairs
from raylp.data.prompt import Prompt
from raylp.data.splits import sentence_hash
from raylp.distill.config import Filters
from raylp.distill.filters import Row, alike, counts, reasons, usual_length_ratios
from raylp.distill.stage import distill
from raylp.progress import Reporter
from raylp.recipe import parse_recipe
from raylp.rundir import RunDir

GOOD = Row("en-de", "The house is very old.", "Das Haus ist sehr alt.", "Das Haus ist ganz alt.", "stop")


def reason_of(row: Row, held_out: frozenset[tuple[str, str]] = frozenset(), **limits: float) -> str | None:
    """Beside good rows, which make lengths usual."""
    return reasons([GOOD, GOOD, row], held_out, Filters.model_validate(limits))[2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"translation": "Das Haus ist uralt."}, None),
        ({"finish": "error", "translation": "ValueError: prompt too long"}, "failed"),
        ({"translation": "", "finish": "length"}, "empty"),
        ({"translation": "Das Haus ist sehr sehr", "finish": "length"}, "not stopped"),
        ({"translation": "Das Haus ist sehr sehr", "finish": "loop"}, "not stopped"),
        ({"translation": "Das Haus\nist alt."}, "control characters"),
        ({"translation": "Das Haus\tist alt."}, "control characters"),
        ({"translation": "Das Haus \ufffd ist alt."}, "control characters"),
        ({"translation": "a " * 201}, "too long"),
        ({"translation": "D"}, "too short"),
        ({"translation": "Das Haus, von dem hier schon so lange die Rede ist, ist wirklich sehr alt."}, "length ratio"),
        ({"translation": "Alt"}, "length ratio"),
        ({"translation": "The House is very old"}, "copy of the source"),
        ({"translation": GOOD.translation}, "duplicate"),
    ],
)  # fmt: skip
def test_each_filter_names_its_reason(changes: dict[str, str], reason: str | None) -> None:
    row = Row(**{**GOOD.__dict__, **changes})
    assert reason_of(row) == reason


def test_the_first_of_several_reasons_is_kept() -> None:
    assert reason_of(Row("en-de", "House", "Haus", "", "error")) == "failed"
    assert (
        reason_of(Row("en-de", "The old house", "Das alte Haus", "the old house the old house the", "loop"))
        == "not stopped"
    )


def test_names_may_be_copied_where_the_reference_copies_them() -> None:
    assert reason_of(Row("en-de", "GNOME Terminal", "GNOME Terminal", "GNOME Terminal", "stop")) is None
    assert reason_of(Row("en-de", "GNOME Terminal", "GNOME-Konsole", "GNOME Terminal", "stop")) == "copy of the source"


def test_length_is_judged_by_what_is_usual_in_the_pair() -> None:
    rows = [Row("en-zh", "x" * 90, "字" * 30, "字" * length, "stop") for length in (30, 31, 90, 5)]
    assert usual_length_ratios(rows)["en-zh"] == pytest.approx(1 / 3)
    assert reasons(rows, set(), Filters()) == [None, None, "length ratio", "length ratio"]


def test_sentences_of_other_splits_are_rejected() -> None:
    other = Row("en-de", "A dog barks.", "Ein Hund bellt.", "Der Hund bellt.", "stop")
    assert reason_of(other, frozenset({("en-de", sentence_hash("a dog barks"))})) == "in another split"
    assert reason_of(other, frozenset({("en-de", sentence_hash("Der Hund bellt"))})) == "in another split"
    assert reason_of(other, frozenset({("en-cs", sentence_hash("a dog barks"))})) is None


def test_distance_to_the_reference() -> None:
    assert reason_of(
        Row("en-de", "A dog barks.", "Ein Hund bellt.", "Zwei Katzen.", "stop"), min_chrf_to_reference=30.0
    )
    assert (
        reason_of(
            Row("en-de", "A dog barks.", "Ein Hund bellt.", "Ein Hund belle.", "stop"), min_chrf_to_reference=30.0
        )
        is None
    )


def test_alike_counts_characters_in_order() -> None:
    assert alike("abcd", "ABCD", 0.99)
    assert not alike("abcd", "dcba", 0.5)
    assert counts([None, "empty", "too long", "empty"]) == {"kept": 1, "empty": 2, "too long": 1}


def make_context(run_dir: Path, data: dict[str, Path], **section: object) -> Context:
    model = toy.toy_model()
    recipe = parse_recipe(toy_recipe(model, data, run_dir, distill=section))
    pairs = {split: read_pairs(file, "xx-yy") for split, file in data.items()}
    splits = Splits(pairs["search"], pairs["train"], pairs["dev"], {"xx-yy": pairs["test"]})
    prompt = Prompt(template=toy.TOY_TEMPLATE)
    return Context(recipe, RunDir(str(run_dir)), splits, prompt, model, "float32", Reporter(quiet=True))


@pytest.mark.slow
def test_the_teacher_translates_every_row_once(tmp_path: Path, toy_data: dict[str, Path], ray_session: None) -> None:
    """Rows that are too long for the engine are in the table too, with the engine's own words as the reason."""
    context = make_context(tmp_path / "run", toy_data, batch_size=8, limit=40, dtype="float32")
    too_long = Pair("long", " ".join(["nefi"] * 300), "sivi", "xx-yy")
    context.splits.train.insert(3, too_long)
    summary = distill(context)
    assert context.rundir.complete("distill")
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "distill" / "teacher.parquet").to_pylist()
    assert [row["id"] for row in rows] == [pair.id for pair in context.splits.train[:40]]
    assert summary == json.loads((tmp_path / "run" / "distill" / "summary.json").read_text())
    assert (summary["rows"], summary["kept"], summary["failed"]) == (40, sum(row["kept"] for row in rows), 1)
    assert rows[3]["reason"] == "failed" and rows[3]["finish"] == "error" and rows[3]["translation"]
    fine = [row for row in rows if row["id"] != "long"]
    right = sum(row["translation"] == row["reference"] for row in fine)
    assert right > 0.9 * len(fine), "the toy model knows its language pair"
    tokenizer = toy.toy_tokenizer()
    assert all(row["tokens"] == len(tokenizer(f" {row['translation']}\n").input_ids) for row in fine)
    assert not context.rundir.names(".work/distill"), "nothing is left of the work"


DRIVER = """
import json, sys
from pathlib import Path
from test_distill import make_context
from raylp.distill.stage import distill
run, data = Path(sys.argv[1]), {k: Path(v) for k, v in json.loads(sys.argv[2]).items()}
print(json.dumps(distill(make_context(run, data, batch_size=2, limit=200))))
"""


def parts(run: Path) -> list[Path]:
    return sorted((run / ".work" / "distill").glob("*/part-*.jsonl"))


@pytest.mark.faults
def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    run = tmp_path / "run"
    arguments = [sys.executable, "-c", DRIVER, str(run), json.dumps({k: str(v) for k, v in toy_data.items()})]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    first = subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while len(parts(run)) < 2 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    saved = {part: part.read_text() for part in parts(run)}
    assert saved, "it was killed in the middle"
    done = sum(len(text.splitlines()) for text in saved.values())
    assert done < 200, "it was killed in the middle"
    second = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=600, check=True)
    summary = json.loads(second.stdout.strip().splitlines()[-1])
    assert summary["found_from_before"] == done
    rows = pyarrow.parquet.read_table(run / "distill" / "teacher.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == 200
