"""Quantising models of a run: real libraries, and engines that run what they leave."""

import importlib.metadata
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
import yaml
from conftest import toy_recipe

from raylp import machine
from raylp.bench.config import Bench
from raylp.bench.ideal import Text, ideal
from raylp.bench.load import Load
from raylp.bench.stage import Cell, compared, runs, summary
from raylp.beside import COMPRESSOR
from raylp.cluster import num_gpus
from raylp.context import Context, Splits
from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.evaluate.stage import comparisons
from raylp.export.export import export
from raylp.generate.pool import make_generator
from raylp.generate.translate import read_prompt, translate
from raylp.generate.vllm_engine import engine_options
from raylp.models.checkpoint import CARD, copy_checkpoint, quantised_layers, read_card, sizes, write_card
from raylp.models.load import load_tokenizer
from raylp.models.source import fingerprint
from raylp.names import SCHEMES as NAMES
from raylp.names import choose_models, kind_of, whole_of
from raylp.pipeline import check_names, run
from raylp.progress import Reporter
from raylp.quantize.config import Quantize
from raylp.quantize.engines import check_cpu, engine_of, identity, run_by
from raylp.quantize.schemes import SCHEMES
from raylp.quantize.stage import _check_matrices, is_made
from raylp.recipe import load_recipe, parse_recipe
from raylp.report.build import report
from raylp.report.contents import Model
from raylp.report.plots import style
from raylp.rundir import RunDir
from raylp.serve.slo import one_for_each_depth

GOOD = list(toy.TRUTH.dead)
PRUNED = f"pruned-{toy.TRUTH.num_layers - len(GOOD)}"
LINEARS = 7  # of a layer


def recipe_for(model: Path, data: dict[str, Path], run_dir: Path, *schemes: str, **more: object) -> dict:
    return toy_recipe(
        model,
        data,
        run_dir,
        search={"given": GOOD, "protect": []},
        quantize={"models": ["baseline", "pruned"], "schemes": list(schemes), "group_size": 32},
        evaluate={"metrics": ["chrF2++"]},
        **more,
    )


@pytest.fixture(scope="module")
def bits(
    ray_session: None, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """A run of models quantised by bitsandbytes, and its recipe."""
    run_dir = tmp_path_factory.mktemp("quantize") / "run"
    recipe = recipe_for(toy_checkpoint, toy_data, run_dir, "nf4", "int8")
    run(parse_recipe(recipe), Reporter(quiet=True))
    return run_dir, recipe


def check_results(run_dir: Path, schemes: tuple[str, ...]) -> None:
    """Every variant is in the results, smaller than what it was made from, and still translates."""
    models = {model["name"]: model for model in RunDir(str(run_dir)).read_json("results.json")["models"]}
    assert set(models) == {m if s is None else f"{m}-{s}" for m in ("baseline", PRUNED) for s in (None, *schemes)}
    for name, model in models.items():
        whole = models[whole_of(name)]
        assert (model["params"], model["layers"]) == (whole["params"], whole["layers"])
        if name != whole["name"]:
            # The vocabulary and the norms are not quantised; all layers are.
            least = whole["params"] * SCHEMES[name.rpartition("-")[2]].bits / 8
            assert least < model["bytes"] < 0.4 * whole["bytes"]
            assert quantised_layers(run_dir / "models" / name) == LINEARS * model["layers"]
        score = model["scores"]["xx-yy"]["chrF2++"]["value"]
        assert score > 97, f"{name} has {score}"


def test_both_of_bitsandbytes(bits: tuple[Path, dict]) -> None:
    run_dir, _ = bits
    check_results(run_dir, ("int8", "nf4"))
    differences = RunDir(str(run_dir)).read_json("results.json")["comparisons"]
    assert {(d["a"], d["b"]) for d in differences} >= {(f"{PRUNED}-nf4", PRUNED), ("baseline-nf4", "baseline")}


def test_a_stock_library_loads_them_and_they_are_other_weights(bits: tuple[Path, dict], toy_data: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run_dir, _ = bits
    sources = [json.loads(line)["source"] for line in toy_data["test"].read_text().splitlines()[:4]]
    requests = read_prompt(run_dir / "models" / PRUNED).requests(
        load_tokenizer(run_dir / "models" / PRUNED), [(source, "xx-yy") for source in sources]
    )
    whole = AutoModelForCausalLM.from_pretrained(run_dir / "models" / PRUNED)
    for scheme in ("nf4", "int8"):
        path = run_dir / "models" / f"{PRUNED}-{scheme}"
        stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        ours = make_generator(path, "transformers", "float32", True).generate(requests)
        for request, output in zip(requests, ours, strict=True):
            asked = torch.tensor([request.tokens])
            said = stock.generate(asked, max_new_tokens=len(output.tokens), do_sample=False, pad_token_id=0)
            assert said[0, asked.shape[1] :].tolist() == list(output.tokens)
            with torch.no_grad():
                gap = (stock(asked).logits - whole(asked).logits).abs().max().item()
            assert 0 < gap < 5


def test_what_is_there_is_not_made_again(bits: tuple[Path, dict]) -> None:
    run_dir, recipe = bits
    place = RunDir(str(run_dir))
    before = made_at(run_dir)
    place.remove(f"models/{PRUNED}-nf4")
    (run_dir / "manifest.json").write_text(
        json.dumps({**place.read_json("manifest.json"), "stages": _without(place, "quantize", "evaluate")})
    )
    run(parse_recipe(recipe), Reporter(quiet=True))
    after = made_at(run_dir)
    assert [name for name in after if after[name] != before[name]] == [f"{PRUNED}-nf4"]


def test_what_an_earlier_version_did_not_note_is_not_made_again() -> None:
    calibration = {"split": "train", "sha256": "a" * 64}
    card = {"removed": [3], "quantized": {"scheme": "gptq", "of": "f", "sentences": 8, "calibration": calibration}}
    earlier = {"scheme": "gptq", "of": "f", "sentences": 8}
    assert is_made({"removed": [3], "quantized": earlier}, card)
    assert is_made({"removed": [3], "quantized": {**card["quantized"], "version": "0.1"}}, card)
    assert not is_made({"removed": [4], "quantized": earlier}, card)
    assert not is_made({"removed": [3], "quantized": {**earlier, "of": "g"}}, card)
    other = {"split": "train", "sha256": "b" * 64}
    assert not is_made({"removed": [3], "quantized": {**earlier, "calibration": other}}, card)
    assert not is_made({"removed": [3]}, card) and not is_made(None, card)


def made_at(run_dir: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in run_dir.glob("models/*/model.safetensors")}


def _without(place: RunDir, *stages: str) -> dict:
    return {name: entry for name, entry in place.read_json("manifest.json")["stages"].items() if name not in stages}


def test_each_engine_runs_its_own(bits: tuple[Path, dict], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = bits
    models = {name: run_dir / "models" / name for name in (PRUNED, f"{PRUNED}-nf4")}
    assert (engine_of(models[PRUNED]), engine_of(models[f"{PRUNED}-nf4"])) == (None, "transformers")
    assert list(run_by("vllm", models, named=False)) == [PRUNED]
    said = f"{PRUNED}-nf4: quantised as nf4, which transformers runs and vllm does not: choose backend transformers"
    with pytest.raises(UserError, match=said):
        run_by("vllm", models, named=True)
    with pytest.raises(UserError, match=said):
        translate(models[f"{PRUNED}-nf4"], "xx-yy", ["a"], io.StringIO(), backend="vllm")
    assert runs(models[f"{PRUNED}-nf4"], Load("batch", 4, "transformers"))
    assert not runs(models[f"{PRUNED}-nf4"], Load("closed", 1))


def test_ideal_counts_the_bytes_that_are_stored(bits: tuple[Path, dict]) -> None:
    run_dir, _ = bits
    names = (PRUNED, f"{PRUNED}-int8", f"{PRUNED}-nf4")
    found = ideal({name: run_dir / "models" / name for name in names}, {"c1": 1}, Text(10), 2)
    whole, eight, four = (found[name] for name in names)
    assert whole["multiply_adds_per_token"] == eight["multiply_adds_per_token"] == four["multiply_adds_per_token"]
    assert 0.5 <= eight["bytes"]["layers"] / whole["bytes"]["layers"] < 0.6
    assert 0.25 <= four["bytes"]["layers"] / whole["bytes"]["layers"] < 0.35
    assert 1 < eight["speedup"]["c1"]["by_bytes"] < four["speedup"]["c1"]["by_bytes"]
    assert four["speedup"]["c1"]["by_operations"] == 1


def test_the_card_says_how_it_is_quantised_and_what_runs_it(bits: tuple[Path, dict], tmp_path: Path) -> None:
    run_dir, _ = bits
    place = RunDir(str(run_dir))
    assert export(place, tmp_path / "out", model=f"{PRUNED}-nf4") == f"{PRUNED}-nf4"
    card = (tmp_path / "out/README.md").read_text()
    by = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"
    assert f"Quantised: 4-bit normal floats, quantised twice, by {by}; the vocabulary is not." in card
    assert "transformers, with bitsandbytes:" in card and "vLLM" not in card.partition("## Use")[2]
    assert "--backend transformers" in card and f"| {PRUNED} |" in card
    export(place, tmp_path / "wmt", "wmt26", f"{PRUNED}-nf4")
    assert "bitsandbytes==" in (tmp_path / "wmt/requirements.txt").read_text()
    assert (
        f"{PRUNED} with 4-bit normal floats, quantised twice; by bitsandbytes" in Path(report(place, None)).read_text()
    )


def test_what_vllm_quantises_itself_takes_no_room_twice(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    """Without the GPU that runs it, only the checkpoint can be looked at."""
    from raylp.pipeline import open_context
    from raylp.quantize.stage import quantize

    base = tmp_path / "base"
    copy_checkpoint(toy_checkpoint, base, link=True)
    copy_checkpoint(toy_checkpoint, tmp_path / "consolidated")
    (tmp_path / "consolidated" / "model.safetensors").rename(base / "consolidated.safetensors")
    for name in ("README.md", "LICENSE"):
        (base / name).write_text("---\nlicense: mit\n---\n")
    recipe = parse_recipe(toy_recipe(base, toy_data, tmp_path / "run"))
    section = Quantize(models=["baseline"], schemes=["fp8_per_channel"])
    context = open_context(recipe, Reporter(quiet=True))
    quantize(replace(context, recipe=recipe.model_copy(update={"quantize": section})))
    made = tmp_path / "run/models/baseline-fp8_per_channel"
    assert (made / "model.safetensors").samefile(base / "model.safetensors")
    stray = {"README.md", "LICENSE", "consolidated.safetensors"}
    assert {file.name for file in made.iterdir()} - {CARD, "manifest.json"} == {f.name for f in base.iterdir()} - stray
    assert engine_options(made) == {**engine_options(toy_checkpoint), "quantization": "fp8_per_channel"}
    assert identity(made) == f"{fingerprint(made)}|fp8_per_channel"
    assert (engine_of(made), whole_of(made.name)) == ("vllm", "baseline")
    assert read_card(toy_checkpoint) is None, "the card is the variant's alone"
    found = ideal({"baseline": toy_checkpoint, made.name: made}, {"c1": 1}, Text(10), 2)
    assert found[made.name]["bytes"]["layers"] == found["baseline"]["bytes"]["layers"] / 2


def test_names() -> None:
    assert set(SCHEMES) == set(NAMES)
    assert whole_of("healed-14-gptq") == "healed-14" and whole_of("healed-14") == "healed-14"
    assert whole_of("baseline-healed") == "baseline-healed" and kind_of("healed-14-gptq") == "healed-14-gptq"
    there = {name: Path(name) for name in ("baseline", "healed-14", "healed-14-gptq", "baseline-gptq")}
    assert list(choose_models(["healed", "healed-14-gptq"], there, "x")) == ["healed-14", "healed-14-gptq"]
    found = comparisons(["baseline", "healed-14", "baseline-healed", "healed-14-nf4", "baseline-nf4"])
    assert ("healed-14-nf4", "healed-14") in found and ("healed-14-nf4", "baseline") in found
    assert found.count(("baseline-nf4", "baseline")) == 1


def test_what_is_measured_by_default(tmp_path: Path) -> None:
    """Every variant of the two that an engine of some load runs."""
    there = {}
    for name in ("baseline", "pruned-16", "pruned-14", "healed-14", "baseline-w8a8", "healed-14-nf4", "pruned-14-nf4"):
        there[name] = tmp_path / name
        there[name].mkdir()
        scheme = name.rpartition("-")[2]
        write_card(there[name], {"quantized": {"scheme": scheme}} if scheme in SCHEMES else {})
    assert list(compared(Bench(), there)) == ["baseline", "healed-14", "baseline-w8a8"]
    offline = Bench(batches=[4], backends=["transformers"])
    assert list(compared(offline, there)) == ["baseline", "healed-14", "baseline-w8a8", "healed-14-nf4"]
    unhealed = {name: there[name] for name in ("baseline", "pruned-14")}
    assert list(compared(Bench(), unhealed)) == ["baseline", "pruned-14"]
    assert list(compared(Bench(models=["pruned"]), there)) == ["pruned-14"]


def test_a_table_leaves_out_what_was_not_measured() -> None:
    from raylp.bench.load import Measurement

    config = Bench(concurrency=[], batches=[2], backends=["vllm", "transformers"], repeats=2)
    there = Measurement([], [], 1.0, {"requests": 2, "tokens": 4, "input_tokens": 4})
    found = {Cell("a", load, r): there for load in config.loads for r in range(2)}
    found |= {Cell("b", Load("batch", 2, "transformers"), r): there for r in range(2)}
    table = summary(["a", "b"], config, found)
    assert list(table["a"]) == ["vllm-b2", "transformers-b2"] and list(table["b"]) == ["transformers-b2"]


@pytest.mark.parametrize(
    ("quantize", "says"),
    [
        ({"schemes": ["q4"]}, "quantize.schemes"),
        ({"scheme": ["nf4"]}, "did you mean 'schemes'?"),
        ({"schemes": ["gptq"], "group_size": 48}, "quantize.group_size"),
        (
            {"schemes": ["nf4"], "models": ["healed"]},
            "quantize.models: this recipe makes no model 'healed'; it makes baseline",
        ),
        ({"schemes": ["w8a8"]}, "/bin/python is not there: run make quantize"),
        ({"schemes": ["fp8"]}, "quantize.schemes: fp8 (8-bit floating point weights and activations) runs on GPUs"),
    ],
)
def test_what_cannot_be_is_refused(
    quantize: dict,
    says: str,
    toy_checkpoint: Path,
    toy_data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_session: None,
) -> None:
    if num_gpus():
        pytest.skip("a GPU runs fp8")
    python = tmp_path / "bin/python"
    monkeypatch.setenv("RAYLP_QUANTIZE_PYTHON", str(python))
    if quantize.get("schemes") == ["gptq"]:  # an environment, as far as the check looks
        (tmp_path / "lib/python3.11/site-packages/llmcompressor-0.14.0.1.dist-info").mkdir(parents=True)
        python.parent.mkdir()
        python.touch()
    recipe = toy_recipe(toy_checkpoint, toy_data, tmp_path / "run", quantize=quantize)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError) as error:
        run(load_recipe(file), Reporter(quiet=True))
    assert says in str(error.value)
    assert not list((tmp_path / "run").glob("models/*-*"))


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        ({"evaluate": {"models": ["healed-2-nf4", "baseline-nf4", "healed"]}}, None),
        ({"evaluate": {"models": ["healed-gptq"]}}, "evaluate.models: this recipe makes no model 'healed-gptq'"),
        ({"evaluate": {"models": ["healed-2-gptq"]}}, "no model 'healed-2-gptq'"),
        ({"evaluate": {"models": ["pruned-2-nf4"]}}, "no model 'pruned-2-nf4'"),
        ({"evaluate": {"models": ["baseline-7"]}}, "no model 'baseline-7'"),
        ({"quantize": {"models": ["healed-2-nf4"], "schemes": ["nf4"]}}, "quantize.models: this recipe makes no model"),
        ({"bench": {"models": ["baseline", "merged"]}}, "bench.models: this recipe makes no model 'merged'"),
    ],
)
def test_names_of_models_are_checked_before_the_start(
    sections: dict, refused: str | None, tmp_path: Path, toy_checkpoint: Path
) -> None:
    usual: dict = {
        "search": {"layers": 2},
        "heal": {},
        "quantize": {"models": ["healed", "baseline"], "schemes": ["nf4"]},
    }
    recipe = toy_recipe(Path("m"), {"test": Path("t.tsv")}, tmp_path / "run", **{**usual, **sections})
    empty = Context(
        parse_recipe(recipe), RunDir(str(tmp_path)), Splits(), Prompt(), toy_checkpoint, "float32", Reporter()
    )
    if refused is None:
        check_names(empty, None)
        return
    check_names(empty, "search")
    with pytest.raises(UserError, match=refused):
        check_names(empty, None)
    with pytest.raises(UserError, match=refused):
        check_names(empty, next(iter(sections)))


def test_groups_that_do_not_divide_are_refused() -> None:
    said = "group_size: 128 weights share a scale, but layers of the model have 64 inputs: set it to 64"
    with pytest.raises(UserError, match=said):
        _check_matrices(toy.tiny_random("llama"), 128, on_cpu=True)
    _check_matrices(toy.tiny_random("llama"), 64, on_cpu=True)


def test_no_mixture_in_4_bits_on_a_cpu() -> None:
    with pytest.raises(UserError, match="on a CPU, vLLM computes no mixture of experts with 4-bit weights"):
        _check_matrices(toy.tiny_random("mixtral"), 64, on_cpu=True)
    _check_matrices(toy.tiny_random("mixtral"), 64, on_cpu=False)


@pytest.mark.skipif(num_gpus() > 0, reason="GPUs compute with 4 bits")
def test_a_cpu_without_avx512_is_not_asked_for_4_bit(
    tmp_path: Path, toy_checkpoint: Path, toy_data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {**torch.cpu.get_capabilities(), "architecture": "x86_64", "avx512_f": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    recipe = recipe_for(toy_checkpoint, toy_data, tmp_path / "run", "nf4", "gptq")
    said = r"quantize.schemes: gptq \(4-bit weights rounded by GPTQ\): on a CPU, .* only where there is AVX-512"
    with pytest.raises(UserError, match=said):
        run(parse_recipe(recipe), Reporter(quiet=True))
    assert not (tmp_path / "run").exists()
    copy_checkpoint(toy_checkpoint, tmp_path / "m-awq", link=True)
    write_card(tmp_path / "m-awq", {"quantized": {"scheme": "awq"}})
    with pytest.raises(UserError, match="m-awq: quantised as awq, which vLLM computes with on a CPU only where"):
        make_generator(tmp_path / "m-awq", "vllm", "bfloat16", newline=False)
    found["avx512_f"] = True
    check_cpu(tmp_path / "m-awq")


def test_variants_of_one_file_are_told_apart(tmp_path: Path, toy_checkpoint: Path) -> None:
    """What vLLM quantises itself has the weights of the whole model, but not its translations."""
    card = {"quantized": {"scheme": "mxfp8"}}
    for name, found in {"whole": None, "mxfp8": card, "unknown": {"quantized": {"scheme": "q3"}}}.items():
        copy_checkpoint(toy_checkpoint, tmp_path / name, link=True)
        if found is not None:
            write_card(tmp_path / name, found)
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "mxfp8")
    assert identity(tmp_path / "whole") != identity(tmp_path / "mxfp8")
    with pytest.raises(UserError, match="quantised as 'q3', which this raylp does not know"):
        engine_of(tmp_path / "unknown")


def test_every_scheme_has_a_look_and_keeps_its_place() -> None:
    looks = {scheme: style(Model(f"healed-14-{scheme}")) for scheme in NAMES}
    assert {colour for colour, _ in looks.values()} == {style(Model("healed-14"))[0]}
    assert len({marker for _, marker in looks.values()}) == len(NAMES)
    layers = {"healed-14-gptq": 14, "pruned-14": 14, "baseline": 18, "baseline-w8a8": 18}
    assert one_for_each_depth(layers) == ["baseline", "healed-14-gptq"]
    assert one_for_each_depth({**layers, "healed-14": 14}) == ["baseline", "healed-14"]


@pytest.mark.quantize
@pytest.mark.slow
def test_what_llm_compressor_makes_vllm_runs(
    ray_session: None, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    schemes = ("awq", "gptq", "w8a8") if machine.computes_4_bit() else ("w8a8",)
    more = {"resources": {"workers": 1}}
    recipe = recipe_for(toy_checkpoint, toy_data, tmp_path / "run", *schemes, **more)
    bench = {"models": ["baseline", f"{PRUNED}-w8a8"], "concurrency": [], "batches": [4], "requests": 4, "repeats": 2}
    run(parse_recipe({**recipe, "bench": bench}), Reporter(quiet=True))
    check_results(tmp_path / "run", schemes)
    for scheme in {"gptq", "awq"} & set(schemes):
        packed = read_card(tmp_path / "run/models" / f"{PRUNED}-{scheme}") or {}
        assert packed["quantized"]["group_size"] == 32
    card = read_card(tmp_path / "run/models" / f"{PRUNED}-w8a8") or {}
    assert card["quantized"]["sentences"] > 0 and card["removed"] == GOOD
    assert card["quantized"]["version"] == COMPRESSOR.require()[1]
    assert len(card["quantized"]["calibration"]["sha256"]) == 64
    measured = json.loads((tmp_path / "run/bench.json").read_text())
    assert measured["models"][f"{PRUNED}-w8a8"]["vllm-b4"]["output_tokens_per_s"]["value"] > 0
    assert sizes(tmp_path / "run/models" / f"{PRUNED}-w8a8")["params"] == card["quantized"]["params"]
