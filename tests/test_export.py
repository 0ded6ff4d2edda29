"""What leaves a run works by itself: the card's own lines translate, and so does the submission, line for line."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import toy
import yaml
from conftest import toy_recipe
from packaging.requirements import Requirement
from test_report import write_run
from typer.testing import CliRunner

from raylp.cli import app
from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.export.card import facts_of, is_directory, line_of, model_card, shareable
from raylp.export.export import choose, export
from raylp.export.portable import Portable
from raylp.export.wmt26 import NEEDED, spellings, write_submission
from raylp.generate.translate import translate
from raylp.models.checkpoint import CARD
from raylp.models.source import licence as read_licence
from raylp.pipeline import run as run_recipe
from raylp.recipe import load_recipe, parse_recipe
from raylp.rundir import RunDir

REMOVED = list(toy.TRUTH.answers[0])
MODEL = f"pruned-{toy.TRUTH.num_layers - len(REMOVED)}"


@pytest.fixture(scope="module")
def finished(
    ray_session: None, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> RunDir:
    """A run that pruned given layers and scored the result."""
    recipe = toy_recipe(
        toy_checkpoint,
        toy_data,
        tmp_path_factory.mktemp("export") / "run",
        search={"given": REMOVED},
        evaluate={"resamples": 100},
    )
    recipe["prompt"]["examples"] = 2
    return run_recipe(parse_recipe(recipe, "toy"))


@pytest.fixture(scope="module")
def carded(finished: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hf") / "model"
    assert export(finished, target) == MODEL
    return target


@pytest.fixture(scope="module")
def python(submission: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that sees no other packages than setup.sh installs."""
    named = {Requirement(line).name for line in (submission / "requirements.txt").read_text().split()} | {"torch"}
    assert named == set(NEEDED)
    root = tmp_path_factory.mktemp("clean")
    (root / "packages").mkdir()
    for name in with_their_own(named):
        for file in importlib.metadata.files(name) or []:
            link = root / "packages" / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not link.is_symlink():
                link.symlink_to(importlib.metadata.distribution(name).locate_file(file.parts[0]))
    script = root / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH=$PYTHONPATH:{root / "packages"} exec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def submission(finished: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wmt26") / "system"
    export(finished, target, "wmt26")
    return target


def translations(model: Path, lines: list[str]) -> list[str]:
    out = io.StringIO()
    translate(model, "xx-yy", lines, out)
    return out.getvalue().split("\n")[:-1]


def test_the_card_says_what_the_run_recorded(finished: RunDir, carded: Path) -> None:
    text = (carded / "README.md").read_text()
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter["language"] == ["xx", "yy"]
    assert "base_model" not in matter  # a directory of this machine is no id of a hub
    assert f"counted from 0 in {toy.toy_model().name}: {', '.join(map(str, REMOVED))}." in text
    assert "They were given, not searched for." in text and "baseline-healed" not in text
    models = {model["name"]: model for model in finished.read_json("results.json")["models"]}
    score = models[MODEL]["scores"]["xx-yy"]["chrF2++"]["value"]
    row = next(line for line in text.splitlines() if line.startswith("| **this** |"))
    assert f" {score:.1f} ±" in row
    assert str(finished.read_json("manifest.json")["data"]["test xx-yy"]["sha256"])[:16] in text
    assert "which its checkpoint does not state" in text  # the toy model has no licence


def test_nothing_of_this_machine_leaves_it(finished: RunDir, carded: Path, submission: Path) -> None:
    for root in (carded, submission):
        for file in root.rglob("*"):
            if file.is_file() and file.suffix != ".safetensors" and "code" not in file.parts:
                text = file.read_text(encoding="utf-8")
                assert str(Path(finished.url).parent) not in text, file
                assert str(Path.home()) + "/" not in text, file
    assert "/" not in json.loads((carded / CARD).read_text())["base_model"]


def test_the_lines_of_the_card_translate_as_raylp_does(carded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code, vllm) = re.findall(r"```python\n(.*?)```", (carded / "README.md").read_text(), re.DOTALL)
    compile(vllm, "vllm", "exec")
    source = toy.toy_pairs(1, seed=77)[0]["source"]
    monkeypatch.chdir(carded)
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", said)
    exec(code.replace('"Good morning!"', json.dumps(source)), {})
    monkeypatch.undo()
    assert said.getvalue().strip() == translations(carded, [source])[0] != ""  # not empty, either


def test_a_line_out_for_every_line_in(submission: Path, python: Path, tmp_path: Path) -> None:
    lines = [
        "vuni gana pamo kasa",
        "",
        "   ",
        "gana pamo kasa",
        "kasa " * 4000,
        "tab\there",
        "two\u2028parts",
        "🙂",
        "",
    ]
    given, made = tmp_path / "in.txt", tmp_path / "out.txt"
    given.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8-sig")  # with a mark of byte order
    with given.open("ab") as stream:
        stream.write(b"gana \xff pamo\n")
    lines.append("gana \N{REPLACEMENT CHARACTER} pamo")
    done = run(
        submission, python, "--lang-pair", "xx-yy", "--batch-size", "4", "--input", str(given), "--output", str(made)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found = made.read_text(encoding="utf-8").split("\n")[:-1]
    assert found == translations(submission / "workdir" / "model", lines)
    assert len(found) == len(lines)
    assert [bool(line) for line in found[:4]] == [True, False, False, True]
    assert "line 5" in done.stderr  # was cut
    assert "line 10: not UTF-8" in done.stderr
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.txt").symlink_to("linked.txt")
    few = tmp_path / "few.txt"
    few.write_text("gana pamo kasa\n")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        run(submission, python, "--lang-pair", "xx-yy", "--input", str(few), "--output", str(tmp_path / "pipe"))
        assert reader.stdout and reader.stdout.read() == f"{found[3]}\n"
    run(submission, python, "--lang-pair", "xx-yy", "--input", str(few), "--output", str(tmp_path / "link.txt"))
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "linked.txt").read_text() == f"{found[3]}\n"
    short = run(submission, python, "xx-yy", "4", stdin=given.read_text(encoding="utf-8", errors="replace"))
    assert short.stdout.split("\n")[:-1] == found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lang-pair", "xx-zz"], "translates xx-yy"),
        ([], "which language pair"),
        (["xx-yy", "0"], "at least 1"),
        (["xx-yy", "4", "5"], "unexpected 5"),
        (["--lang-pair"], "needs a value"),
        (["--lang-pair", "xx-yy", "--input", "nowhere.txt"], "cannot be read"),
        (["--lang-pair", "xx-yy", "--output", "no/where.txt"], "no such directory"),
        (["--lang-pair", "xx-yy", "--output", "/"], "is a directory"),
        (["--pairs", "xx-yy"], "unknown option --pairs"),
    ],
)
def test_wrong_calls_of_the_submission_say_what_is_wrong(
    submission: Path, python: Path, arguments: list[str], says: str
) -> None:
    done = run(submission, python, *arguments)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[0]
    assert done.stdout == ""


def with_their_own(names: set[str]) -> set[str]:
    """The packages and all they require here."""
    found: set[str] = set()
    waiting = [name.lower() for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found and is_installed(name):  # torch on a GPU requires more than on a CPU
            found.add(name)
            for requirement in map(Requirement, importlib.metadata.requires(name) or []):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(requirement.name.lower().replace("_", "-"))
    return found


def is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.distribution(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_the_recipe_of_a_submission_is_whole_and_names_no_place_of_this_machine(finished: RunDir) -> None:
    text = Portable().recipe(finished.read_text("recipe.yaml"))
    content = yaml.safe_load(text)
    assert content["data"]["xx-yy"]["test"] == "data/xx-yy/test/test.jsonl"
    assert content["run_dir"] == "run"
    assert parse_recipe(content, "portable").search is not None


def told(rundir: RunDir, name: str, **card: object) -> tuple[str, dict]:
    """The card of a model of a written run, and its front matter."""
    file = Path(rundir.url) / "models" / name / CARD
    file.parent.mkdir(parents=True, exist_ok=True)
    prompt = Prompt(examples={"en-de": [('a "b" {c}', "d\n")]}).model_dump(mode="json")
    file.write_text(json.dumps({"base_model": "owner/base", "removed": [5, 9, 3], "prompt": prompt, **card}))
    text = model_card(facts_of(rundir, name))
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")
    return text, yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_healed_model_tells_how_it_was_made_and_how_good_it_is(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    text, matter = told(rundir, "healed-15")
    assert matter["base_model"] == "owner/base"
    assert "Removed, in this order, counted from 0 in owner/base: 5, 9, 3." in text
    assert "Trained on parallel text and translations of" in text
    assert "`baseline-healed`: the same, trained as a healed model is" in text
    assert "- healed-15 less baseline-healed, en-de chrF2++: " in text
    assert "| **this** | 1 request at a time | " in text
    pruned, _ = told(rundir, "pruned-15", repair={"method": "merge"})
    assert "Trained on" not in pruned and "(LaCo)" in pruned


def test_the_card_names_a_middle_model_by_itself(tmp_path: Path) -> None:
    """What was removed is counted in the model it was cut from, which lacks layers of its own."""
    rundir = write_run(tmp_path / "run")
    middle = tmp_path / "somewhere" / "healed-17"
    middle.mkdir(parents=True)
    (middle / CARD).write_text(json.dumps({"base_model": "owner/base", "removed": [4]}))
    text, _ = told(rundir, "healed-15", base_model=str(middle))
    assert "counted from 0 in healed-17: 5, 9, 3." in text
    assert "| cut from | healed-17, itself without its layers 4 |" in text
    assert "| which is of | owner/base |" in text
    assert str(tmp_path) not in text
    (middle / CARD).write_text(json.dumps({"base_model": "owner/base", "removed": []}))
    text, _ = told(rundir, "healed-15", base_model=str(middle))
    assert "counted from 0 in owner/base" in text and "Trained on the pair before layers were removed." in text


def test_the_card_tells_no_training_that_was_not(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    cut = tmp_path / "somewhere" / "pruned-17"
    cut.mkdir(parents=True)
    (cut / CARD).write_text(json.dumps({"base_model": "owner/base", "removed": [4]}))
    assert "before layers were removed" not in told(rundir, "healed-15", base_model=str(cut))[0]
    content = yaml.safe_load(rundir.read_text("recipe.yaml"))
    del content["distill"]
    content["heal"] = {"epochs": 20, "patience": 3}
    rundir.write_text("recipe.yaml", yaml.safe_dump(content))
    assert "Trained on parallel text (lora, at most 20 epochs)." in told(rundir, "healed-15")[0]


def test_the_card_of_a_quantised_model_says_by_what_and_on_what(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    whole, matter = told(rundir, "healed-15")
    assert "Quantised" not in whole and matter["base_model_relation"] == "finetune"
    earlier = {"scheme": "gptq", "maker": "llm-compressor", "sentences": 64}
    text, matter = told(rundir, "healed-15-gptq", quantized=earlier)
    assert matter["base_model_relation"] == "quantized"
    assert "by llm-compressor; the vocabulary is not. Calibrated on the first 64 pairs of the training text" in text
    noted = {**earlier, "version": "0.14.0.1", "calibration": {"split": "train", "sha256": "0123456789abcdef" * 4}}
    text, _ = told(rundir, "healed-15-gptq", quantized=noted)
    assert "by llm-compressor 0.14.0.1; the vocabulary is not." in text
    assert "that the prompt does not show, SHA-256 0123456789abcdef." in text
    text, _ = told(rundir, "healed-15-nf4", quantized={"scheme": "nf4", "maker": "bitsandbytes", "version": "0.50.2"})
    assert "by bitsandbytes 0.50.2; the vocabulary is not.\n" in text and "alibrated" not in text
    text, matter = told(rundir, "healed-15-mxfp8", quantized={"scheme": "mxfp8", "maker": "vllm"})
    assert "by vllm; the vocabulary is not. On disk the weights are whole." in text
    assert matter["base_model_relation"] == "quantized"


def test_notices_and_licence_of_the_base_come_from_the_revision_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for commit, ref, said in (("a" * 40, "main", "mit"), ("b" * 40, "v1", "apache-2.0")):
        snapshot = tmp_path / "hub" / "models--owner--base" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "README.md").write_text(f"---\nlicense: {said}\n---\n")
        refs = snapshot.parents[1] / "refs"
        refs.mkdir(exist_ok=True)
        (refs / ref).write_text(commit)
    rundir = write_run(tmp_path / "run")
    manifest = rundir.read_json("manifest.json")
    rundir.write_json("manifest.json", {**manifest, "model": {"name": "owner/base"}})
    content = yaml.safe_load(rundir.read_text("recipe.yaml"))
    for revision, said in ((None, "mit"), ("v1", "apache-2.0")):
        content["model"] = {"name": "owner/base", "revision": revision}
        rundir.write_text("recipe.yaml", yaml.safe_dump(content))
        assert told(rundir, "healed-15")[1]["license"] == said
        assert facts_of(rundir, "healed-15").revision == revision
    content["model"] = {"name": "/else/where", "revision": "v1"}
    rundir.write_text("recipe.yaml", yaml.safe_dump(content))
    assert facts_of(rundir, "healed-15").revision is None


def test_front_matter_is_yaml_whatever_the_run_is_about(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run", test_set="en-no")
    content = yaml.safe_load(rundir.read_text("recipe.yaml"))
    content["data"] = {"en-no": {"test": "x"}}
    rundir.write_text("recipe.yaml", yaml.safe_dump(content))
    manifest = rundir.read_json("manifest.json")
    for licence, said in (("apache-2.0", "apache-2.0"), ("Terms: of use, here", "other"), ("", "other")):
        manifest["model"] = {**manifest["model"], "licence": licence}
        rundir.write_json("manifest.json", manifest)
        text, matter = told(rundir, "healed-15", prompt=Prompt(chat=True).model_dump(mode="json"))
        (tmp_path / "README.md").write_text(text)
        (tmp_path / "config.json").write_text("{}")
        assert read_licence(tmp_path) == (licence or None), "as whoever prunes it again will find it"
        assert matter["language"] == ["en", "no"]
        assert matter["license"] == said
        assert matter.get("license_name", "") == ("" if said != "other" else licence)


def test_the_card_of_a_model_that_may_think_has_it_answer(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    chat = Prompt(chat=True).model_dump(mode="json")
    assert "enable_thinking" not in told(rundir, "healed-15", prompt=chat)[0]
    template = Path(rundir.url) / "models" / "healed-15" / "chat_template.jinja"
    template.write_text("{{ enable_thinking }}", encoding="utf-8")
    text, _ = told(rundir, "healed-15", prompt=chat)
    assert 'return_tensors="pt", enable_thinking=False)' in text
    assert 'chat_template_kwargs={"enable_thinking": False})' in text


def test_no_place_of_this_machine_is_in_a_portable_recipe() -> None:
    here = "/home/someone/secret"
    recipe = {
        "model": {"name": f"{here}/adapted"},
        "data": {"a:en-de": {"train": [f"{here}/train/t.en", f"{here}/train/t.de"], "mono": f"{here}/mono.txt"}},
        "search": {"layers": 3, "objective": {f"{here}/comet": 1.0}},
        "distill": {
            "teacher": f"{here}/big",
            "filters": {"comet": f"{here}/kiwi", "embedding_model": f"{here}/labse"},
        },
        "evaluate": {"metrics": [f"{here}/comet"]},
        "serve": {"api_keys": f"{here}/keys"},
        "resources": {"address": "ray://10.0.0.7:10001"},
        "cache": f"{here}/cache",
        "run_dir": f"{here}/run",
    }
    portable = Portable()
    text = portable.recipe(yaml.safe_dump(recipe))
    assert "someone" not in text and "10.0.0.7" not in text
    content = yaml.safe_load(text)
    assert content["model"]["name"] == "base"
    assert content["data"]["a:en-de"]["train"] == ["data/a-en-de/train/t.en", "data/a-en-de/train/t.de"]
    assert content["distill"]["teacher"] == "teacher"
    assert portable.needed == {
        "base": "the model adapted it was cut from",
        "comet/comet": "the COMET checkpoint comet",
        "comet/kiwi": "the COMET checkpoint kiwi",
        "embedding/labse": "the embedding model labse",
        "teacher": "the teacher big",
    }


def test_files_of_one_name_have_places_of_their_own() -> None:
    recipe = {
        "model": {"name": "owner/base"},
        "data": {
            "a:en-de": {"train": ["/one/t.txt", "/two/t.txt"], "dev": ["/one/t.txt", "/one/t.txt"]},
            "a-en-de": {"pair": "en-de", "train": "/three/t.txt"},
        },
        "search": {"layers": 3, "objective": {"/one/comet": 1.0, "/two/comet": 1.0, "likelihood": 1.0}},
        "evaluate": {"metrics": ["/two/comet/checkpoints/model.ckpt", "BLEU", "Unbabel/wmt22-comet-da"]},
    }
    portable, text = Portable(), yaml.safe_dump(recipe, sort_keys=False)
    content = yaml.safe_load(portable.recipe(text))
    first, second = content["data"].values()
    assert first["train"] == ["data/a-en-de/train/t.txt", "data/a-en-de/train/t-2.txt"]
    assert first["dev"] == ["data/a-en-de/dev/t.txt"] * 2
    assert second["train"] == "data/a-en-de/train/t-3.txt"
    assert list(content["search"]["objective"]) == ["./comet/comet", "./comet/comet-2", "likelihood"]
    assert content["evaluate"]["metrics"][0] == "./comet/comet-2/checkpoints/model.ckpt"
    assert content["evaluate"]["metrics"][1:] == recipe["evaluate"]["metrics"][1:]
    assert portable.plan({"objective": {"/two/comet": 1.0}}) == {"objective": {"./comet/comet-2": 1.0}}
    assert content == yaml.safe_load(Portable().recipe(text))
    assert parse_recipe(content, "portable", Path("/there"))


def test_a_text_is_no_path_however_it_begins() -> None:
    templates = ("/{source_language}/ {source}\n/{target_language}/", "~ {source} =", "a/b/{source}")
    for template in templates:
        recipe = {"model": {"name": "owner/base"}, "data": {}, "prompt": {"template": template}}
        content = yaml.safe_load(Portable().recipe(yaml.safe_dump(recipe)))
        assert content["prompt"]["template"] == template
    plan = {"model": "m", "stopped": "/ is what it says", "rounds": [{"note": "~x"}]}
    assert Portable().plan(plan) == plan


def test_the_name_of_a_served_teacher_is_the_servers() -> None:
    distill = {"teacher": "/models/big", "endpoint": "http://127.0.0.1:8000/v1"}
    recipe = {"model": {"name": "owner/base"}, "data": {}, "distill": distill}
    portable = Portable()
    assert yaml.safe_load(portable.recipe(yaml.safe_dump(recipe)))["distill"] == distill
    assert portable.needed == {}


def test_a_model_is_named_by_its_directory_or_as_others_name_it(tmp_path: Path) -> None:
    for name in ("owner/name", "package:name"):
        assert not is_directory(name) and shareable(name) == name
    for name in (str(tmp_path), "adapted", "./adapted", ".cache/adapted", "~/models/adapted", "runs/demo/adapted"):
        assert is_directory(name) and shareable(name) == Path(name).name


def test_the_readme_of_a_submission_names_what_is_there(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "run")
    for searched in (True, False):
        if not searched:
            rundir.remove("plan.json")
        target = tmp_path / f"system-{searched}"
        (target / "workdir" / "model").mkdir(parents=True)
        write_submission(rundir, facts_of(rundir, "healed-15"), target)
        text = (target / "README.md").read_text()
        named = {name for name in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)}
        files = {name for names in named for name in re.findall(r"`(.+?)`", names)}
        assert all((target / name).exists() for name in files)
        assert ("workdir/plan.json" in files) == searched
    pinned = {Requirement(line).name for line in (target / "requirements.txt").read_text().splitlines()}
    assert pinned == set(NEEDED) - {"torch"} and "what these need in turn is left to pip" in text


def test_pairs_have_the_tasks_spellings() -> None:
    found = spellings(("cs-de", "en-zh", "en-arz"))
    assert found["ces-deu"] == found["cs-de"] == found["cs-deu"] == "cs-de"
    assert found["eng-zho_Hans"] == found["en-zh"] == "en-zh"
    assert found["eng-ara_EG"] == found["en-ar"] == found["en-ar_EG"] == "en-arz"
    assert spellings(("eng-zho",))["eng-zho_Hans"] == "eng-zho"
    assert spellings(("eng-ara_EG",))["en-arz"] == "eng-ara_EG"
    with pytest.raises(UserError, match="en-ar and en-arz of the run may both be written"):
        spellings(("en-ar", "en-arz"))


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(finished: RunDir, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="something is there already"):
        export(finished, full)
    assert [file.name for file in full.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=f"no such model; it has {MODEL}"):
        export(finished, tmp_path / "new", model="healed")
    with pytest.raises(UserError, match="one of hf, wmt26"):
        export(finished, tmp_path / "new", "onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full"]
    assert choose(finished, "pruned") == choose(finished, None) == MODEL
    empty = RunDir(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="has no models yet"):
        choose(empty, None)


def test_a_base_is_followed_to_its_beginning(carded: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / CARD).write_text(json.dumps({"base_model": "owner/name"}))
    assert [model.name for model in line_of(str(cut))] == [str(cut), "owner/name"]
    assert [model.name for model in line_of("owner/name")] == ["owner/name"]


def test_the_verb_says_where_it_wrote_what(finished: RunDir, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", finished.url, "--to", str(target)])
    assert done.exit_code == 0
    assert f"{target}  {MODEL}, format hf" in done.output
    assert load_recipe(Path(finished.url) / "recipe.yaml")  # the run is as it was
    assert (target / "model.safetensors").stat().st_size > 0


def run(submission: Path, python: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """run.sh with that Python, a proxy that answers nobody for a network, and a shell whose cd says where it went."""
    nobody = "http://127.0.0.1:9"
    env = {**os.environ, "PYTHON": str(python), "https_proxy": nobody, "http_proxy": nobody, "CDPATH": "."}
    command = ["bash", "system/run.sh", *arguments]
    with tempfile.TemporaryDirectory() as elsewhere:
        (Path(elsewhere) / "numpy.py").write_text("raise SystemExit")
        (Path(elsewhere) / "system").symlink_to(submission.resolve())
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=env, check=False, timeout=300, cwd=elsewhere
        )
