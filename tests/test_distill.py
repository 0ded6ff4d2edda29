"""Teacher data: what is fit to learn from, and translating through Ray Data and vLLM without losing a row."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import torch
import toy
from conftest import toy_recipe
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raylp.context import Context, Splits
from raylp.data.corpus import Pair, read_pairs, read_sources
from raylp.data.prompt import Prompt
from raylp.data.tokens import Top
from raylp.distill.config import Distill, Filters
from raylp.distill.filters import HeldOut, Judge, Row, alike, usual_length_ratios
from raylp.distill.parts import Parts, Said
from raylp.distill.select import best, by_likelihood
from raylp.distill.stage import _digest, _output, _teacher, check, distill, engine_dtype, unique_ids
from raylp.errors import UserError
from raylp.heal.config import Heal
from raylp.heal.stage import _examples
from raylp.progress import Reporter
from raylp.recipe import Resources, parse_recipe
from raylp.rundir import RunDir

GOOD = Row("en-de", "The house is very old.", "Das Haus ist sehr alt.", "Das Haus ist ganz alt.", "stop")
ENGLISH, GERMAN = "There is a church in this village.", "In diesem Dorf gibt es eine Kirche."
USUAL = {"en-de": 1.0, "en-zh": 1 / 3, "xx-yy": 1.0}


def judge(held_out: Sequence[Pair] = (), **limits: object) -> Judge:
    return Judge(Filters.model_validate(limits), USUAL, HeldOut.of(held_out))


def reason_of(row: Row, held_out: Sequence[Pair] = (), **limits: object) -> str | None:
    """After a good row, of which it may be a duplicate."""
    return judge(held_out, **limits).reasons([GOOD, row])[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"translation": "Das Haus ist uralt."}, None),
        ({"finish": "error", "translation": "ValueError: prompt too long"}, "failed"),
        ({"translation": "", "finish": "length"}, "empty"),
        ({"translation": "Das Haus ist sehr sehr", "finish": "length"}, "not stopped"),
        ({"translation": "Das Haus ist sehr sehr", "finish": "loop"}, "repetition"),
        ({"translation": "Das Haus\nist alt."}, "newline"),
        ({"translation": "Das Haus\u2028ist alt."}, "newline"),
        ({"translation": "Das Haus\tist alt."}, "control characters"),
        ({"translation": "Das Haus \ufffd ist alt."}, "control characters"),
        ({"translation": "a " * 201}, "too long"),
        ({"translation": "D", "source": "A"}, "too short"),
        ({"translation": "Das Haus, von dem hier schon so lange die Rede ist, ist wirklich sehr alt."}, "length ratio"),
        ({"translation": "Alt"}, "length ratio"),
        ({"translation": "The House is very old"}, "copy of the source"),
        ({"translation": GOOD.translation}, "duplicate"),
        ({"translation": "This sentence is English and not German.", "source": ENGLISH}, "target language"),
        ({"source": "Dieser Satz ist deutsch und nicht englisch.", "translation": GERMAN}, "source language"),
    ],
)  # fmt: skip
def test_each_filter_names_its_reason(changes: dict[str, str], reason: str | None) -> None:
    row = Row(**{**GOOD.__dict__, **changes})
    assert reason_of(row) == reason


@pytest.mark.parametrize("text", ["مصر دى بلد كبيره اوى وفيها ناس كتير", "الراجل ده كان شغال فى المصنع من زمان"])
def test_dialects_are_no_foreign_languages(text: str) -> None:
    for pair in ("en-arz", "en-ar_EG"):
        row = Row(pair, "A sentence whose language is English.", "", text, "stop")
        assert judge().reasons([row]) == [None]
    row = Row("en-de", "A sentence whose language is English.", "", text, "stop")
    assert judge(max_length_ratio=False).reasons([row]) == ["target language"]


def test_lines_are_judged_as_they_were_said() -> None:
    row = Row("en-de", GOOD.source, GOOD.reference, "Gern: Das Haus ist alt.", "stop", "Gern:\nDas Haus ist alt.")
    assert reason_of(row) == "newline"
    assert reason_of(replace(row, said=" Das Haus ist uralt.\n", translation="Das Haus ist uralt.")) is None


def test_what_cannot_work_is_refused_early() -> None:
    for section, said in (
        ({"by": "BLEU"}, "samples are chosen by chrF"),
        ({"by": "comet23"}, "no metric 'comet23'"),
        ({"samples": 3, "sources": "mono", "by": "chrf++"}, "no references for chrF"),
        ({"samples": 3, "temperature": 0}, "all the same"),
        ({"endpoint": "http://x/v1"}, "needs the name of its model"),
        ({"filters": {"comet": "chrF++"}}, "a COMET checkpoint is wanted"),
    ):
        with pytest.raises(ValidationError, match=said):
            Distill.model_validate(section)


def test_each_filter_can_be_turned_off() -> None:
    off = {name: False for name, field in Filters.model_fields.items() if field.annotation is not str}
    rows = [
        Row("en-de", GOOD.source, GOOD.reference, text, finish)
        for text, finish in [("", "length"), ("a\nb", "loop"), ("\ufffd", "stop"), ("a " * 500, "stop"), ("D", "stop")]
    ]
    assert judge(**off).reasons([*rows, *rows, GOOD]) == [None] * 11
    assert judge(**off).names() == ["failed", "in another split"]
    with pytest.raises(ValidationError, match="give a number, or false"):
        Filters.model_validate({"max_words": True})


def test_the_first_of_several_reasons_is_kept() -> None:
    assert reason_of(Row("en-de", "House", "Haus", "", "error")) == "failed"
    assert reason_of(Row("en-de", "The old house", "Das alte Haus", "the old house the old", "loop")) == "repetition"


def test_what_each_filter_took_is_counted() -> None:
    counting = judge()
    counting.reasons([GOOD, GOOD, Row("en-de", "Yes.", "Ja.", "", "stop")])
    counting.reasons([GOOD])
    assert {name: count for name, count in counting.taken.items() if count} == {"duplicate": 2, "empty": 1}
    assert list(counting.taken)[:3] == ["failed", "duplicate", "empty"]


def test_names_may_be_copied_where_the_reference_copies_them() -> None:
    assert reason_of(Row("en-de", "GNOME Terminal", "GNOME Terminal", "GNOME Terminal", "stop")) is None
    assert reason_of(Row("en-de", "GNOME Terminal", "GNOME-Konsole", "GNOME Terminal", "stop")) == "copy of the source"


def test_length_is_judged_by_what_is_usual_in_the_pair() -> None:
    pairs = [Pair(str(i), "x" * 90, "字" * length, "en-zh") for i, length in enumerate((30, 31, 29))]
    assert usual_length_ratios(pairs)["en-zh"] == pytest.approx(1 / 3)
    rows = [Row("en-zh", "x" * 90, "", "字" * length, "stop") for length in (30, 31, 90, 5)]
    assert judge(language=False).reasons(rows) == [None, None, "length ratio", "length ratio"]


def test_sentences_of_other_splits_are_rejected() -> None:
    other = [Pair("1", "A dog barks.", "Ein Hund bellt.", "en-de")]
    assert reason_of(Row("en-de", "a dog barks", "", "Der Hund bellt.", "stop"), other) == "in another split"
    assert reason_of(Row("en-de", "The dog barks.", "", "ein Hund bellt", "stop"), other) == "in another split"
    assert reason_of(Row("en-fr", "a dog barks", "", "Un chien aboie.", "stop"), other) is None


def test_near_sentences_of_other_splits_are_rejected() -> None:
    other = [Pair("1", "Click the green button in the corner.", "Klicken Sie auf den grünen Knopf.", "en-de")]
    near = Row("en-de", "Click the green button in a corner.", "", "Drücken Sie den Knopf in der Ecke.", "stop")
    assert reason_of(near, other) == "near another split"
    assert reason_of(near, other, max_similarity_to_held_out=0.99) is None
    assert reason_of(near, other, max_similarity_to_held_out=False) is None


def test_distance_to_the_reference() -> None:
    row = Row("en-de", "The house is very old.", "Das Haus ist sehr alt.", "Die Hütte war ganz neu.", "stop")
    assert reason_of(row) is None
    assert reason_of(row, min_chrf_to_reference=40) == "far from the reference"


def test_models_are_asked_about_what_is_left() -> None:
    asked: list[list[str]] = []

    def similarity(rows: Sequence[Row]) -> list[float]:
        asked.append([row.translation for row in rows])
        return [0.9 if row is GOOD else 0.1 for row in rows]

    filters = Filters(min_embedding_similarity=0.7)
    rows = [GOOD, Row("en-de", "Yes.", "Ja.", "", "stop"), Row("en-de", "No, never.", "Nein.", "Blau.", "stop")]
    judged = Judge(filters, USUAL, HeldOut(), similarity)
    assert judged.reasons(rows) == [None, "empty", "embedding similarity"]
    assert asked == [[GOOD.translation, "Blau."]]


def test_alike_counts_characters_in_order() -> None:
    assert alike("GNOME Terminal", "gnome terminal", 0.99)
    assert not alike("abc", "xyz", 0.1)
    assert alike("abcd", "abxd", 0.7) and not alike("abcd", "abxd", 0.8)


def test_no_id_is_there_twice() -> None:
    pairs = [Pair(name, "a", "b", "xx-yy") for name in ("1", "2", "1", "1", "3")]
    assert list(unique_ids(pairs)) == ["1", "2", "1~2", "1~3", "3"]


def test_source_text_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One dog.\n\n Two dogs. \n")
    (tmp_path / "a.jsonl").write_text('{"id": "x", "source": "One dog."}\n{"source": "Two dogs."}\n')
    for name, ids in (("a.txt", ["1", "3"]), ("a.jsonl", ["x", "2"])):
        found = read_sources(tmp_path / name, "en-de")
        assert [(pair.id, pair.source, pair.target) for pair in found] == list(
            zip(ids, ["One dog.", "Two dogs."], ["", ""], strict=True)
        )
    (tmp_path / "b.jsonl").write_text('{"id": "x", "source": "a"}\n{"id": "x", "source": "b"}\n')
    with pytest.raises(UserError, match="'x' stands twice"):
        read_sources(tmp_path / "b.jsonl", "en-de")
    (tmp_path / "c.jsonl").write_text('{"source": "One dog.\\nTwo dogs."}\n')
    with pytest.raises(UserError, match="line 1: a line break inside the source"):
        read_sources(tmp_path / "c.jsonl", "en-de")


# --- parts ---


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**16))
def test_parts_are_read_in_order_whatever_the_order_of_writing(count: int, size: int, seed: int) -> None:
    rng = random.Random(seed)
    numbers = list(range(count))
    for _ in range(count // 4):  # rows that a crash left over come with others later
        numbers.append(numbers.pop(rng.randrange(count)))
    batches = [numbers[start : start + size] for start in range(0, count, size)]
    rng.shuffle(batches)
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(RunDir(folder), "work", count)
        for batch in batches[: len(batches) // 2]:
            parts.add([Said(number, (number, 7), logprob=-0.5) for number in batch])
        again = Parts(RunDir(folder), "work", count)
        left = {number for batch in batches[len(batches) // 2 :] for number in batch}
        assert set(again.missing().tolist()) == left
        for batch in batches[len(batches) // 2 :]:
            again.add([Said(number, text="a\u2028b", finish="stop") for number in batch])
        assert again.done.all()
        assert [said.index for said in again] == list(range(count))
        with pytest.raises(AssertionError, match="twice"):
            again.add([Said(0)])


def test_probabilities_are_kept_compactly() -> None:
    top = Top(np.arange(6, dtype=np.int32).reshape(3, 2), np.linspace(-4, 0, 6).astype(np.float16).reshape(3, 2))
    said = Said.of(json.loads(json.dumps(Said(4, (1, 2, 3), logprob=0.0, top=top).as_dict())))
    assert said.tokens == (1, 2, 3) and said.logprob == 0.0, "a teacher may be sure"
    assert np.array_equal(said.top.ids, top.ids) and np.array_equal(said.top.logprobs, top.logprobs)


def test_the_best_ended_by_itself() -> None:
    rows = [Row("xx-yy", "a", "b", text, finish) for text, finish in (("x", "length"), ("y", "stop"), ("z", "stop"))]
    assert best(rows, [9.0, 1.0, 2.0]) == 2
    assert best(rows, [9.0, 2.0, 2.0]) == 1
    assert by_likelihood(rows, [-1.0, None, -0.5]) == [-1.0, float("-inf"), -0.5]


def make_context(run_dir: Path, data: dict[str, Path], cache: str | None = None, **section: object) -> Context:
    model = toy.toy_model()
    recipe = parse_recipe(toy_recipe(model, data, run_dir, distill=section, cache=cache))
    pairs = {split: read_pairs(file, "xx-yy") for split, file in data.items()}
    splits = Splits(pairs["search"], pairs["train"], pairs["dev"], {"xx-yy": pairs["test"]})
    prompt = Prompt(template=toy.TOY_TEMPLATE)
    return Context(recipe, RunDir(str(run_dir)), splits, prompt, model, "float32", Reporter(quiet=True))


@pytest.mark.slow
def test_the_teacher_translates_every_row_once(tmp_path: Path, toy_data: dict[str, Path], ray_session: None) -> None:
    """Rows that are too long for the engine are in the table too, with the engine's own words as the reason.

    The teacher comes with Mistral's own files beside, which are not read. Other runs that share its cache, or name it
    as theirs, take the table over.
    """
    teacher = str(toy.with_mistrals_own(toy.toy_model(), tmp_path / "teacher"))
    too_long = Pair("long", " ".join(["nefi"] * 300), "sivi", "xx-yy")

    def asks(name: str, cache: str) -> Context:
        options = {"teacher": teacher, "batch_size": 8, "limit": 40, "dtype": "float32"}
        made = make_context(tmp_path / name, toy_data, str(tmp_path / cache), **options)
        made.splits.train.insert(3, too_long)
        return made

    context = asks("run", "cache")
    summary = distill(context)
    assert context.rundir.complete("distill")
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "distill" / "teacher.parquet").to_pylist()
    assert [row["id"] for row in rows] == [pair.id for pair in context.splits.train[:40]]
    assert summary == json.loads((tmp_path / "run" / "distill" / "summary.json").read_text())
    assert (summary["rows"], summary["kept"]) == (40, sum(row["kept"] for row in rows))
    assert summary["rejected"]["failed"] == 1
    assert rows[3]["reason"] == "failed" and rows[3]["finish"] == "error" and rows[3]["translation"]
    fine = [row for row in rows if row["id"] != "long"]
    right = sum(row["translation"] == row["reference"] for row in fine)
    assert right > 0.9 * len(fine), "the toy model knows its language pair"
    tokenizer = toy.toy_tokenizer()
    assert all(row["tokens"] == len(tokenizer(f" {row['translation']}\n").input_ids) for row in fine)
    assert not context.rundir.names(".work/distill"), "nothing is left of the work"
    # One that is killed at the very end leaves parts, and a cache without the table; the next start sees to both.
    asked = _digest(
        context, context.recipe.distill, _teacher(context, context.recipe.distill), context.splits.train[:40]
    )
    context.rundir.write_text(f".work/distill/{asked}/part-1.jsonl", "")
    shutil.rmtree(tmp_path / "cache")
    assert distill(context) == summary and not context.rundir.names(".work/distill")
    for name, cache in (("second", "cache"), ("third", "run")):
        other = asks(name, cache)
        assert distill(other) == summary and other.rundir.complete("distill")
        assert not other.rundir.exists(".work"), "nobody translated"
        made, taken = (tmp_path / run / "distill" / "teacher.parquet" for run in ("run", name))
        assert taken.read_bytes() == made.read_bytes()


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why(tmp_path: Path, toy_data: dict[str, Path], ray_session: None) -> None:
    """The engine's process names the cause in its own log alone; here that vLLM refuses layers of two kinds."""
    context = make_context(tmp_path / "run", toy_data, teacher=str(toy.tiny_random("qwen2_sliding")))
    with pytest.raises(UserError, match=r"failed: AssertionError: Sliding window .*another teacher.*distill\.log"):
        distill(context)
    assert "Sliding window" in (tmp_path / "run/logs/distill.log").read_text()


@pytest.mark.slow
def test_the_likeliest_sample_is_kept_and_its_probabilities_teach(
    tmp_path: Path, toy_data: dict[str, Path], ray_session: None
) -> None:
    """Three samples of each source, the teacher's first four words at every place, and a heal that learns from them."""
    options = {"samples": 3, "by": "likelihood", "temperature": 1.0, "top_k": 4, "limit": 24, "batch_size": 16}
    context = make_context(tmp_path / "run", toy_data, dtype="float32", **options)
    summary = distill(context)
    table = pyarrow.parquet.read_table(tmp_path / "run" / "distill" / "teacher.parquet")
    rows = table.to_pylist()
    assert summary["samples"] == 3 and summary["tokens"] > 2 * sum(row["tokens"] for row in rows)
    assert {row["sample"] for row in rows} <= {0, 1, 2} and all(row["score"] <= 0 for row in rows)
    for row in rows:
        ids, logprobs = (np.array(row[name]).reshape(row["tokens"], 4) for name in ("top_ids", "top_logprobs"))
        assert len(row["token_ids"]) == row["tokens"]
        assert (np.diff(logprobs.astype(float), axis=1) <= 0).all() and (np.exp(logprobs).sum(1) < 1.01).all()
        if row["finish"] == "stop":
            likely = [token in near for token, near in zip(row["token_ids"], ids, strict=True)]
            assert sum(likely) >= len(likely) - 1
    assert sum(row["translation"] == row["reference"] for row in rows) >= 20
    heal = {"data": "teacher", "loss": {"cross_entropy": 0, "distillation": 1, "teacher": "stored"}}
    recipe = context.recipe.model_copy(update={"heal": Heal.model_validate(heal)})
    learning = replace(context, recipe=recipe)
    train, _ = _examples(learning, recipe.heal, toy.toy_model())
    assert len(train) == summary["kept"] and all(example.top is not None for example in train)
    ends = [example.target[-1] for example in train]
    assert set(ends) == {toy.toy_tokenizer()(toy.TOY_STOP, add_special_tokens=False).input_ids[-1]}


def test_a_teacher_with_other_words_is_refused_before_it_translates(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(toy.toy_model(), teacher)
    tokenizer = toy.toy_tokenizer()
    tokenizer.add_tokens(["neu"])
    tokenizer.save_pretrained(teacher)
    context = make_context(tmp_path / "run", toy_data, teacher=str(teacher), top_k=4)
    heal = Heal.model_validate({"data": "teacher", "loss": {"distillation": 1, "teacher": "stored"}})
    asks = replace(context, recipe=context.recipe.model_copy(update={"heal": heal}))
    with pytest.raises(UserError, match="another vocabulary"):
        distill(asks)
    assert not context.rundir.names(".work")


def test_a_teacher_without_a_chat_is_refused_before_anything_is_done(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    context = make_context(tmp_path / "run", toy_data, teacher=str(toy.toy_model()))
    with pytest.raises(UserError, match=r"distill\.teacher: .* has no chat template"):
        check(replace(context, prompt=context.prompt.model_copy(update={"chat": True})))


def test_translations_are_of_the_tokenizer_and_the_stops_too(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    """Not of the dtype that auto stands for on this machine, so that another may go on."""
    pairs = read_pairs(toy_data["train"], "xx-yy")
    context = make_context(tmp_path / "run", toy_data)
    config = context.recipe.distill
    teacher = _teacher(context, config)
    of = _digest(context, config, teacher, pairs)
    assert of == _digest(context, config, replace(teacher, dtype="other"), pairs)
    more = toy.toy_tokenizer()
    more.add_tokens(["neu"])
    rule = replace(teacher.rule, stop=teacher.rule.stop | {5})
    others = [replace(teacher, tokenizer=more), replace(teacher, rule=rule)]
    assert len({of, *(_digest(context, config, other, pairs) for other in others)}) == 3
    sized = make_context(tmp_path / "run", toy_data, dtype="float32")
    assert _digest(sized, sized.recipe.distill, teacher, pairs) != of


def test_what_an_endpoint_repeats_is_seen(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    context = make_context(tmp_path / "run", toy_data)
    teacher = _teacher(context, context.recipe.distill)
    endless = _output(Said(0, text=" " + "gofa " * 20, finish="stop"), teacher, True)
    assert (endless.finish, endless.text) == ("loop", ("gofa " * 20).strip()) and len(endless.tokens) >= 20
    assert _output(Said(0, text=" gofa tize", finish="length"), teacher, True).finish == "length"
    assert _output(Said(0, text="", finish="stop"), teacher, True).finish == "stop"


@pytest.mark.faults
def test_an_engine_that_always_dies_is_not_started_for_ever(
    tmp_path: Path, toy_data: dict[str, Path], ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was translated in between is kept, as after any other failure."""
    monkeypatch.setattr("raylp.distill.engine.MAX_RESTARTS", 1)
    run, done = tmp_path / "run", threading.Event()

    def kill() -> None:
        saved = 0
        while not done.wait(0.02):
            if len(parts(run)) > saved:
                saved = len(parts(run))
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        if "EngineCore" in process.name() + " ".join(process.cmdline()):
                            process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(UserError, match=r"distill: the engine failed: .*distill\.log"):
            distill(make_context(run, toy_data, batch_size=2, samples=32, by="likelihood", dtype="float32"))
    finally:
        done.set()
        killer.join()
    assert 2 <= len(parts(run)) < 3200


DRIVER = """
import json, sys
from pathlib import Path
from test_distill import make_context
from raylp.distill.stage import distill
run, data = Path(sys.argv[1]), {k: Path(v) for k, v in json.loads(sys.argv[2]).items()}
print(json.dumps(distill(make_context(run, data, batch_size=2, limit=200, dtype="float32"))))
"""


def parts(run: Path) -> list[Path]:
    return sorted((run / ".work" / "distill").glob("*/part-*.jsonl"))


@pytest.mark.faults
def test_a_driver_killed_three_times_translates_the_same(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    files = json.dumps({split: str(file) for split, file in toy_data.items()})
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(Path(__file__).parent)

    def command(run: Path) -> list[str]:
        return [sys.executable, "-c", DRIVER, str(run), files]

    run, saved = tmp_path / "run", 0
    for _ in range(3):
        driver = subprocess.Popen(command(run), env=env, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 400
        while len(parts(run)) < saved + 2 and time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert saved < len(parts(run)) < 100, "it was killed in the middle"
        saved = len(parts(run))
    before = {part: part.read_text() for part in parts(run)}
    last = subprocess.run(command(run), env=env, capture_output=True, text=True, timeout=600, check=True)
    summary = json.loads(last.stdout.strip().splitlines()[-1])
    assert summary["found_from_before"] == sum(len(text.splitlines()) for text in before.values())
    subprocess.run(command(tmp_path / "undisturbed"), env=env, stdout=subprocess.DEVNULL, timeout=600, check=True)
    killed, whole = (
        pyarrow.parquet.read_table(tmp_path / name / "distill" / "teacher.parquet").to_pylist()
        for name in ("run", "undisturbed")
    )
    assert len({row["id"] for row in killed}) == len(killed) == 200
    assert killed == whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs multiply bfloat16")
def test_the_teachers_dtype_is_one_that_is_quick_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for found, dtype in (("avx512_bf16", "bfloat16"), ("avx512_f", "float32")):
        capable = {"architecture": "x86_64", found: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: capable)
        assert engine_dtype(Distill(), Resources()) == dtype
    assert engine_dtype(Distill(dtype="float16"), Resources()) == "float16"
    assert engine_dtype(Distill(), Resources(address="auto")) == "bfloat16", "what computes there is not known here"
