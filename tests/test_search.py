"""The search on a model whose dispensable layers are known, over real Ray workers."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import toy
from conftest import toy_recipe
from hypothesis import given
from hypothesis import strategies as st

from raylp.errors import UserError
from raylp.generate.pool import plan_workers
from raylp.generate.transformers_view import TransformersGenerator
from raylp.ledger import decoding_of
from raylp.metrics.ngram import metric
from raylp.models.load import load_model, load_tokenizer
from raylp.models.source import fingerprint
from raylp.pipeline import check_names, fingerprints, open_context, run
from raylp.progress import Reporter
from raylp.recipe import Resources, parse_recipe
from raylp.rundir import RunDir
from raylp.search.blocks import Block, make_blocks
from raylp.search.stage import stack_path
from raylp.search.worker import Translate, Weigh, pieces

pytestmark = pytest.mark.usefixtures("ray_session")
SEARCH = {"remove": toy.TRUTH.num_removable, "strategy": "exhaustive"}


def recipe_for(toy_checkpoint: Path, toy_data: dict[str, Path], run_dir: Path, **sections: object):
    return parse_recipe(toy_recipe(toy_checkpoint, toy_data, run_dir, **{"search": SEARCH, **sections}))


def generations(run_dir: Path) -> list[dict]:
    return [json.loads(line) for file in run_dir.glob("logs/generations-*") for line in file.read_text().splitlines()]


def ledger_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for file in run_dir.glob("ledger/*.jsonl") for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def searched(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a search and a pruned model."""
    run_dir = tmp_path_factory.mktemp("searched") / "run"
    recipe = recipe_for(toy_checkpoint, toy_data, run_dir)
    run(recipe, Reporter(quiet=True))
    return run_dir


def test_finds_what_brute_force_finds(searched: Path, toy_checkpoint: Path, toy_data: dict[str, Path]) -> None:
    """Every set of as many layers, scored in this process, one by one: none is better than the search's."""
    context = open_context(recipe_for(toy_checkpoint, toy_data, searched), Reporter(quiet=True))
    generator = TransformersGenerator(load_model(toy_checkpoint), load_tokenizer(toy_checkpoint))
    chrf = metric("chrF2++")
    blocks = make_blocks(context.splits.search, context.prompt, load_tokenizer(toy_checkpoint), 16)

    def score(removed: tuple[int, ...]) -> float:
        return chrf.score(
            sum(
                chrf.statistics([o.text for o in generator.generate(b.requests, removed)], b.references).sum(0)
                for b in blocks
            )
        )

    scores = {
        removed: score(removed)
        for removed in itertools.combinations(range(1, toy.TRUTH.num_layers - 1), toy.TRUTH.num_removable)
    }
    best = max(scores.values())
    plan = json.loads((searched / "plan.json").read_text())
    found = tuple(sorted(plan["removed"]))
    assert scores[found] == best
    assert found in toy.TRUTH.answers
    assert plan["rounds"][-1]["score"]["value"] == pytest.approx(best, abs=1e-9)


def test_plan_holds_every_round(searched: Path) -> None:
    plan = json.loads((searched / "plan.json").read_text())
    assert plan["stack"] == "model.layers" and plan["num_layers"] == toy.TRUTH.num_layers
    assert plan["backend"] == "transformers" and plan["dtype"] == "float32"
    assert [layer for r in plan["rounds"] for layer in r["removed"]] == plan["removed"]
    for number, r in enumerate(plan["rounds"]):
        assert len(r["candidates"]) == toy.TRUTH.num_layers - 2 - number
        assert all(c["sentences"] == c["score"]["n"] == toy.SPLIT_SIZES["search"] for c in r["candidates"])
        assert max(c["score"]["value"] for c in r["candidates"]) == r["score"]["value"]


def test_every_score_is_computed_once(searched: Path) -> None:
    lines = ledger_lines(searched)
    assert len({line["key"] for line in lines}) == len(lines) == len(generations(searched))
    candidates = 1 + sum(toy.TRUTH.num_layers - 2 - i for i in range(toy.TRUTH.num_removable))
    assert len(lines) == candidates * toy.SPLIT_SIZES["search"] // 16
    assert {len(line["statistics"]) for line in lines} == {16}


def test_again_is_at_once(searched: Path, toy_checkpoint: Path, toy_data: dict[str, Path]) -> None:
    plan, count = (searched / "plan.json").read_text(), len(generations(searched))
    run(recipe_for(toy_checkpoint, toy_data, searched), Reporter(quiet=True))
    assert (searched / "plan.json").read_text() == plan and len(generations(searched)) == count


def test_a_relative_run_directory_is_the_drivers(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are elsewhere: their working directory is that of the Ray that was there before."""
    monkeypatch.chdir(tmp_path)
    run(recipe_for(toy_checkpoint, toy_data, Path("run"), search={"remove": 1}), Reporter(quiet=True), only="search")
    made = {line["worker"] for line in ledger_lines(tmp_path / "run")}
    assert len(ledger_lines(tmp_path / "run")) > 10 and "driver" not in made


def test_what_is_searched_already_needs_no_metric(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(
        toy_checkpoint, toy_data, tmp_path / "run", search={"remove": 1, "objective": {"not_there:score": 1}}
    )
    with pytest.raises(UserError, match="not_there"):
        open_context(recipe, Reporter(quiet=True))
    manifest = {"model": {"dtype": "float32"}, "stages": {"search": {}}}
    RunDir(str(tmp_path / "run")).write_json("manifest.json", manifest)
    open_context(recipe, Reporter(quiet=True))


def test_a_depth_that_is_not_made_is_told_before_the_start(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    for name, fine in ((f"pruned-{toy.TRUTH.num_layers - 2}", True), (f"pruned-{toy.TRUTH.num_layers - 1}", False)):
        sections = {"search": {"remove": 2}, "evaluate": {"models": ["baseline", name]}}
        context = open_context(recipe_for(toy_checkpoint, toy_data, tmp_path / "run", **sections), Reporter(quiet=True))
        if fine:
            check_names(context, None)
            continue
        with pytest.raises(UserError, match=rf"makes no model '{name}'; it makes baseline, pruned, cut to 6 layers"):
            check_names(context, None)


def test_what_ends_a_translation_is_part_of_what_its_score_is_of(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    assert decoding_of(False, [1, 2]) == decoding_of(False, [2, 1]) != decoding_of(False, [1])
    other = shutil.copytree(toy_checkpoint, tmp_path / "other")
    file = other / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [1, 5]}))
    assert fingerprint(other) == fingerprint(toy_checkpoint)
    contexts = [
        open_context(recipe_for(model, toy_data, tmp_path / model.name), Reporter(quiet=True))
        for model in (toy_checkpoint, other)
    ]
    assert len({fingerprints(context)["search"] for context in contexts}) == 2


def test_a_run_goes_on_in_the_type_it_began_in(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path) -> None:
    """Also where what `auto` stands for is another, as on a machine with a GPU."""
    recipe = recipe_for(toy_checkpoint, toy_data, tmp_path / "run")
    assert open_context(recipe, Reporter(quiet=True)).dtype == "float32"
    RunDir(str(tmp_path / "run")).write_json("manifest.json", {"model": {"dtype": "bfloat16"}, "stages": {}})
    assert open_context(recipe, Reporter(quiet=True)).dtype == "bfloat16"


def test_an_interrupted_evaluate_takes_no_translations_of_other_text(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    """The test text changes between a kill and the next start; what the manifest says of it changes too."""
    rows = [json.loads(line) for line in toy_data["test"].read_text().splitlines()][:20]
    data = {**toy_data, "test": tmp_path / "test.jsonl"}
    sections = {"search": {"given": [2]}, "evaluate": {"models": ["baseline"], "metrics": ["chrF++"]}}
    recipe = recipe_for(toy_checkpoint, data, tmp_path / "run", **sections)
    hashes = []
    for targets in (rows[0]["target"], "quite other words"):
        rows[0]["target"] = targets
        data["test"].write_text("".join(json.dumps(row) + "\n" for row in rows))
        rundir = run(recipe, Reporter(quiet=True))
        said = [json.loads(line) for line in rundir.read_text("translations/baseline/xx-yy.jsonl").splitlines()]
        assert [row["target"] for row in said] == [row["target"] for row in rows]
        manifest = rundir.read_json("manifest.json")
        hashes.append(manifest["data"]["test xx-yy"]["sha256"])
        del manifest["stages"]["evaluate"]  # as if it had been killed at its end
        rundir.write_json("manifest.json", manifest)
    assert len(set(hashes)) == 2


def test_a_lost_plan_comes_back_from_the_ledger(
    searched: Path, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    """Another run with the first one's ledger as its cache computes nothing and decides the same."""
    recipe = recipe_for(toy_checkpoint, toy_data, tmp_path / "run", cache=str(searched))
    run(recipe, Reporter(quiet=True), only="search")
    assert generations(tmp_path / "run") == []
    old, new = (json.loads((d / "plan.json").read_text()) for d in (searched, tmp_path / "run"))
    assert old == new


def test_pruned_model_is_whole(searched: Path, toy_checkpoint: Path) -> None:
    plan = json.loads((searched / "plan.json").read_text())
    path = searched / "models" / f"pruned-{toy.TRUTH.num_layers - toy.TRUTH.num_removable}"
    card = json.loads((path / "raylp.json").read_text())
    assert card["removed"] == plan["removed"] and card["base_fingerprint"] == fingerprint(toy_checkpoint)
    assert card["prompt"]["template"] == toy.TOY_TEMPLATE
    assert json.loads((path / "manifest.json").read_text())["files"]["model.safetensors"]["bytes"] > 0


def test_a_published_list_needs_no_search(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(toy_checkpoint, toy_data, tmp_path, search={"given": [6, 2]})
    run(recipe, Reporter(quiet=True))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["removed"] == [6, 2] and plan["rounds"] == []
    assert (tmp_path / "models/pruned-6/model.safetensors").exists() and generations(tmp_path) == []


def test_a_published_list_is_cut_to_several_depths(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    search = {"given": [6, 2, 4], "layers": [5, 7]}
    run(recipe_for(toy_checkpoint, toy_data, tmp_path, search=search), Reporter(quiet=True))
    plan = json.loads((tmp_path / "plan.json").read_text())
    depths = [{"layers": 7, "removed": [6]}, {"layers": 5, "removed": [6, 2, 4]}]
    assert plan["depths"] == depths and plan["removed"] == [6, 2, 4]
    for depth in depths:
        card = json.loads((tmp_path / f"models/pruned-{depth['layers']}/raylp.json").read_text())
        assert card["removed"] == depth["removed"]
    with pytest.raises(UserError, match=r"4 of 8 layers are to stay, and search.given names 3 .*: 5 to 7 can stay"):
        search["layers"] = [4, 7]
        run(recipe_for(toy_checkpoint, toy_data, tmp_path / "short", search=search), Reporter(quiet=True))


def test_stack_path_without_weights() -> None:
    assert stack_path(toy.tiny_random("gemma3")) == "model.language_model.layers"
    assert stack_path(toy.tiny_random("llama")) == "model.layers"


@given(
    st.lists(st.tuples(st.sampled_from(["xx-yy", "xx-zz"]), st.integers(1, 16), st.integers(1, 5)), max_size=30),
    st.sampled_from(["transformers", "vllm"]),
    st.integers(1, 40),
    st.integers(1, 4),
)
def test_pieces_hold_every_translation_once(
    asked: list[tuple[str, int, int]], backend: str, rows: int, workers: int
) -> None:
    """Within the bound, of one language pair or of one view, and not all for one worker where there are several."""
    other = Weigh("", "", (), (), (), "float32", "tail", 0, {})
    works = [
        Translate("", "", Block(pair, ("",) * size, ("",) * size, (), (), ""), (layer,), {"m": {"backend": backend}})
        for pair, size, layer in asked
    ]
    found = pieces([*works, other], rows, workers, lambda work: work.removed[0])
    assert sorted(map(id, itertools.chain.from_iterable(found))) == sorted(map(id, [*works, other]))
    assert found[0] == [other]
    assert all(len(piece) == 1 or sum(len(work.block) for work in piece) <= rows for piece in found[1:])
    shared = [{work.block.pair if backend == "transformers" else work.removed for work in piece} for piece in found[1:]]
    assert all(len(names) == 1 for names in shared)


def test_pieces_as_small_as_blocks_are_blocks() -> None:
    """The last block of a pair is short; with others in a batch its composition would not always be the same."""
    blocks = [Block("xx-yy", ("",) * size, ("",) * size, (), (), "") for size in (16, 4)]
    works = [Translate("", "", b, (i,), {"m": {"backend": "transformers"}}) for i in range(1, 5) for b in blocks]
    assert all(len(piece) == 1 for piece in pieces(works, 16, 1))
    short = [work for work in works if len(work.block) == 4]  # a race's last look
    assert all(len(piece) == 1 for piece in pieces(short, 16, 1, block=16))
    even = pieces(works, 80, 2, lambda work: len(work.block))
    assert [sum(len(work.block) for work in piece) for piece in even] == [40, 40], "one for each worker"


def test_a_worker_that_dies_is_replaced(tmp_path: Path, toy_checkpoint: Path) -> None:
    import os
    import signal

    import ray

    from raylp.generate.base import Request
    from raylp.generate.pool import Pool

    pool = Pool(1, True, tmp_path)
    asked = [Request(tuple(load_tokenizer(toy_checkpoint)("gofa tize =").input_ids), 8)]
    killed = []

    def submit(worker, unit):
        if not killed:
            killed.append(ray.get(worker.pid.remote()))
            os.kill(killed[0], signal.SIGKILL)
        return worker.translate.remote(str(toy_checkpoint), "transformers", "float32", asked)

    with Reporter(quiet=True).task("test") as task:
        done = dict(pool.run(range(3), submit, task))
    pool.close()
    assert sorted(done) == [0, 1, 2]
    assert len({outputs[0].tokens for outputs, _ in done.values()}) == 1


@pytest.mark.parametrize("workers", ["auto", 2])
def test_too_little_memory_is_told_in_numbers(workers: Literal["auto"] | int) -> None:
    with pytest.raises(UserError, match=r"about 100000\d\.\d GB of memory, \d+\.\d GB are free"):
        plan_workers(Resources(workers=workers), 1e15)


@pytest.fixture(scope="module")
def others(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Runs a search in a directory of its own; its plan and directory."""

    def run_search(workers: object = "auto", **search: object) -> tuple[dict, Path]:
        run_dir = tmp_path_factory.mktemp("other") / "run"
        search = {"remove": toy.TRUTH.num_removable, **search}
        recipe = recipe_for(toy_checkpoint, toy_data, run_dir, search=search, resources={"workers": workers})
        run(recipe, Reporter(quiet=True), only="search")
        return json.loads((run_dir / "plan.json").read_text()), run_dir

    return run_search


def test_race_finds_the_answer_for_less(others, searched: Path) -> None:
    plan, run_dir = others(block=4)
    assert tuple(sorted(plan["removed"])) in toy.TRUTH.answers
    sentences = sum(g["sentences"] for g in generations(run_dir))
    assert sentences == plan["spent"]["sentences"] < sum(g["sentences"] for g in generations(searched)) / 1.5
    assert all(r["strategy"] == "race" and r["risk"] == 0.05 for r in plan["rounds"])
    assert plan["rounds"][-1]["score"]["n"] == toy.SPLIT_SIZES["search"]
    assert plan["noise"] < plan["baseline"]["value"]


@pytest.mark.parametrize(
    "search",
    [
        {"strategy": "sleb"},
        {"objective": "likelihood", "strategy": "exhaustive"},
        {"objective": "agreement"},
        {"strategy": "oneshot", "criterion": "block_influence", "remove": 2},
        {"objective": {"chrF++": 1, "BLEU": 0.5}, "per_round": 2},
        {"strategy": "exhaustive", "beam": 2, "swaps": 1},
    ],
    ids=lambda search: "-".join(map(str, search.values())),
)
def test_other_ways_find_it_too(others, search: dict) -> None:
    plan, _ = others(**search)
    found = set(plan["removed"])
    if plan["strategy"] == "oneshot":
        assert found == set(toy.TRUTH.dead)  # of twins it sees two layers that each do something
    else:
        assert tuple(sorted(found)) in toy.TRUTH.answers
    assert plan["rounds"][-1]["score"]["n"] == toy.SPLIT_SIZES["search"]


def test_several_depths_from_one_search(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(toy_checkpoint, toy_data, tmp_path, search={"layers": [7, 5], "block": 4})
    run(recipe, Reporter(quiet=True))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [depth["layers"] for depth in plan["depths"]] == [7, 5]
    assert plan["depths"][0]["removed"] == plan["removed"][:1] and plan["depths"][1]["removed"] == plan["removed"]
    for depth in plan["depths"]:
        card = json.loads((tmp_path / f"models/pruned-{depth['layers']}/raylp.json").read_text())
        assert card["removed"] == depth["removed"]


def test_the_allowed_loss_stops_it(others) -> None:
    plan, _ = others(remove=None, max_loss=5.0, strategy="exhaustive")
    assert set(toy.TRUTH.dead) <= set(plan["removed"]) and len(plan["removed"]) == toy.TRUTH.num_removable
    assert "at most 5 is allowed" in plan["stopped"]


def test_a_search_that_may_remove_nothing_says_so(others) -> None:
    needed = {layers[0] for layers in toy.TRUTH.forgotten if len(layers) == 1}
    protect = [layer for layer in range(toy.TRUTH.num_layers) if layer not in needed]
    with pytest.raises(UserError, match=r"no layer can go: without \[\d\] the loss would be .* raise search.max_loss"):
        others(remove=None, max_loss=0.5, protect=protect, block=16)


def test_another_metric_needs_no_generation(
    searched: Path, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    search = {**SEARCH, "objective": {"BLEU": 1.0, "chrF++": 1.0}}
    run(recipe_for(toy_checkpoint, toy_data, tmp_path, cache=str(searched), search=search), Reporter(quiet=True))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert generations(tmp_path) == [] and tuple(sorted(plan["removed"])) in toy.TRUTH.answers


def test_replay_of_a_recording(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raylp.cli import main
    from raylp.rundir import RunDir
    from raylp.search.replay import read_recording, replay

    recording = read_recording(RunDir(str(searched)))
    assert recording.sentences == toy.SPLIT_SIZES["search"] and len(recording.rounds) == toy.TRUTH.num_removable
    plan = json.loads((searched / "plan.json").read_text())
    rounds = replay(recording, times=20, block=4)
    assert [r.best for r in rounds] == plan["removed"]
    assert all(r.same + r.tie >= 0.95 and r.sentences < r.exhaustive for r in rounds)
    with pytest.raises(SystemExit) as left:
        main(["replay", str(searched), "--times", "3"])
    assert left.value.code == 0 and "exhaustive takes" in capsys.readouterr().out


def test_a_short_heal_leaves_the_weights_alone(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path) -> None:
    """Adapters learn what the missing layer did, and are gone afterwards."""
    import torch

    from raylp.data.corpus import read_pairs
    from raylp.data.prompt import Prompt
    from raylp.heal.examples import tokenise
    from raylp.search.short_heal import ShortHeal, chosen_examples, healed

    model, tokenizer = load_model(toy_checkpoint), load_tokenizer(toy_checkpoint)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompt = Prompt(template=toy.TOY_TEMPLATE)
    train, test = (read_pairs(str(toy_data[split]), "xx-yy") for split in ("train", "test"))
    options = ShortHeal(steps=40, learning_rate=5e-3)
    batches = chosen_examples(tokenise(train, prompt, tokenizer, 100), options)
    assert len(batches) == 40 and all(len(batch) == 8 for batch in batches)
    generator = TransformersGenerator(model, tokenizer)
    requests = prompt.requests(tokenizer, [(pair.source, pair.pair) for pair in test])

    def score(outputs) -> float:
        rows = metric("chrF2++").statistics([o.text for o in outputs], [pair.target for pair in test])
        return metric("chrF2++").score(rows.sum(0))

    broken = score(generator.generate(requests, [1]))
    with healed(model, [1], batches, options) as alive:
        assert alive is model
        mended = score(generator.generate(requests))
    assert mended > broken + 10
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert score(generator.generate(requests, [1])) == broken


def test_the_best_few_are_healed_before_one_is_chosen(others) -> None:
    plan, run_dir = others(short_heal={"best": 2, "steps": 6}, remove=1, block=8)
    (first,) = plan["rounds"]
    assert len(first["healed"]) == 2 and plan["removed"] == first["healed"][0]["removed"]
    assert first["healed"][0]["score"]["value"] >= first["healed"][1]["score"]["value"]
    assert any("|healed:" in line["decoding"] for line in ledger_lines(run_dir))


def test_backend_auto_times_both_and_keeps_to_one(others) -> None:
    plan, run_dir = others(workers=1, backend="auto", block=16)
    assert tuple(sorted(plan["removed"])) in toy.TRUTH.answers
    record = json.loads((run_dir / "search.json").read_text())
    assert set(record["backend_seconds"]) == {"transformers", "vllm"}
    assert plan["backend"] == min(record["backend_seconds"], key=record["backend_seconds"].get)
    assert {line["backend"] for line in ledger_lines(run_dir) if "texts" in line} == {plan["backend"]}
