"""Repair without training: the published formulas, on every family, and a toy model of which the answer is known."""

import io

import pytest
import torch
import toy
from conftest import toy_recipe

from raylp.data.corpus import read_pairs
from raylp.data.prompt import Prompt, beside_examples
from raylp.data.splits import text_hash
from raylp.data.tokens import Example, examples_of
from raylp.errors import UserError
from raylp.generate.transformers_view import TransformersGenerator
from raylp.models.checkpoint import read_card
from raylp.models.load import load_model, load_tokenizer
from raylp.models.view import without_layers
from raylp.pipeline import run
from raylp.progress import Reporter
from raylp.recipe import parse_recipe
from raylp.repair.compensate import compensate, gap
from raylp.repair.concatenate import concatenate
from raylp.repair.layer import gains, set_gains
from raylp.repair.merge import merge, runs
from raylp.repair.stage import mend
from raylp.search.forced import ForcedScorer

REMOVED = (3, 1)
JOINED = {"llama", "qwen2", "qwen2_sliding", "qwen3", "mistral", "gemma2", "gemma3_text", "gemma3", "cohere", "cohere2"}


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (count,), generator=generator).tolist())

    return [Example(tokens(3 + 2 * i), tokens(1 + i)) for i in range(8)]


def scorer_for(family: str) -> ForcedScorer:
    return ForcedScorer(load_model(toy.tiny_random(family)), examples(), batch_size=4)


def logits(model, removed=()) -> torch.Tensor:
    with torch.no_grad(), without_layers(model, removed):
        return model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits


@pytest.mark.parametrize("family", sorted(set(toy.FAMILIES) - {"olmo2"}))
def test_compensation_scales_what_comes_behind_the_gap(family):
    """Of a stream that is smaller by all alphas, a layer behind the gaps makes what it made, smaller by as much."""
    scorer = scorer_for(family)
    last = scorer.layers[-1]
    seen = {}

    def catch(_, args, kwargs):
        seen["args"], seen["kwargs"] = args, kwargs

    handle = last.register_forward_pre_hook(catch, with_kwargs=True)
    logits(scorer.model)
    handle.remove()

    def run(times: float) -> torch.Tensor:
        args, kwargs = seen["args"], dict(seen["kwargs"])
        if args:
            args = (args[0] * times, *args[1:])
        else:
            kwargs["hidden_states"] = kwargs["hidden_states"] * times
        with torch.no_grad():
            output = last(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    before = run(1.0)
    alphas = compensate(scorer, REMOVED)
    assert list(alphas) == list(REMOVED)
    assert all(abs(alpha - 1) > 0.01 for alpha in alphas.values()), "the gaps of these models are wide"
    factor = 1 / (alphas[3] * alphas[1])
    assert torch.allclose(run(factor) / factor, before, atol=1e-3 * float(before.abs().max()))


def test_compensation_is_the_published_one():
    """Embeddings and every output projection before the gap times alpha, in a model whose embeddings are its own."""
    ours, theirs = scorer_for("llama"), scorer_for("llama")
    assert ours.model.get_output_embeddings().weight is not ours.model.get_input_embeddings().weight
    alpha = compensate(ours, (3,))[3]
    assert alpha == pytest.approx(gap(theirs, (), 3))
    with torch.no_grad():
        scaled = [theirs.model.get_input_embeddings()]
        scaled += [p for layer in theirs.layers[:3] for p in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        for module in scaled:
            module.weight = torch.nn.Parameter(module.weight * alpha)
    wanted = logits(theirs.model, (3,))
    assert float((logits(ours.model, (3,)) - wanted).norm() / wanted.norm()) < 1e-3
    plain = logits(scorer_for("llama").model, (3,))
    assert float((plain - wanted).norm() / wanted.norm()) > 0.05


def test_gap_is_the_mean_ratio_of_magnitudes():
    scorer = scorer_for("gpt2")
    rows = {"before": [], "after": []}
    for example in examples():
        tokens = torch.tensor([[*example.prompt, *example.target[:-1]]])
        with torch.no_grad():
            states = scorer.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
        rows["before"].append(states[2][0])
        rows["after"].append(states[3][0])
    before, after = (torch.cat(parts).abs().mean(0) for parts in rows.values())
    assert gap(scorer, (), 2) == pytest.approx(float((after / before).mean()), rel=1e-4)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_merge_adds_the_differences(family):
    scorer = scorer_for(family)
    names = [name for name, _ in scorer.layers[1].named_parameters()]
    old = {(i, name): scorer.layers[i].get_parameter(name).clone() for i in (1, 2, 3, 5) for name in names}
    (tried,) = merge(scorer, (3, 2), above=-1.0)
    assert (tried.into, tried.layers, tried.kept) == (1, (2, 3), True)
    for name in names:
        wanted = old[2, name] + old[3, name] - old[1, name]
        assert torch.allclose(scorer.layers[1].get_parameter(name), wanted, atol=1e-5), name
    before = logits(scorer.model, (2, 3))
    (again,) = merge(scorer, (5,), above=1.0)
    assert not again.kept
    assert torch.equal(logits(scorer.model, (2, 3)), before), "what is not kept is as before"


def test_runs_have_a_neighbour_that_stays():
    assert runs((3, 2, 6), 8) == [(1, (2, 3)), (5, (6,))]
    assert runs((0, 1), 4) == [(2, (0, 1))]


@pytest.mark.parametrize("family", sorted(JOINED))
def test_channels_of_both_layers_make_one(family):
    """The neurons of one layer are dealt out to two, whose norms differ; joined, they are that layer again."""
    scorer = scorer_for(family)
    one, other = scorer.layers[:2]
    given = {}

    def catch(_, args, kwargs):
        given["call"] = (args, kwargs)

    handle = one.register_forward_pre_hook(catch, with_kwargs=True)
    logits(scorer.model)
    handle.remove()

    def gives() -> torch.Tensor:
        with torch.no_grad():
            output = one(*given["call"][0], **given["call"][1])
        return output[0] if isinstance(output, tuple) else output

    before = gives()
    other.load_state_dict(one.state_dict())
    half = one.mlp.down_proj.weight.shape[1] // 2
    with torch.no_grad():
        one.mlp.down_proj.weight[:, ::2] = 0
        other.mlp.down_proj.weight[:, 1::2] = 0
        for projection in (other.self_attn.q_proj, other.self_attn.k_proj, other.self_attn.v_proj):
            projection.weight /= 2
        set_gains(other.input_layernorm, 2 * gains(other.input_layernorm))
        if family.startswith("cohere"):  # one norm for both parts
            for projection in (other.mlp.gate_proj, other.mlp.up_proj):
                projection.weight /= 2
    assert not torch.allclose(gives(), before, atol=1e-3)
    (joined,) = concatenate(scorer, (1,), dict.fromkeys(range(scorer.num_layers), 1.0))
    assert (joined.into, joined.layer, joined.neurons) == (0, 1, (half, half))
    assert torch.allclose(gives(), before, atol=1e-4)


def test_a_dead_layer_takes_in_a_living_one(tmp_path):
    """Of the twins 2 and 4 one must stay. Without both the toy model forgets its nouns, unless the dead layer 3 becomes
    layer 4.
    """
    data = toy.write_toy_data(tmp_path)
    model, tokenizer = load_model(toy.toy_model()), load_tokenizer(toy.toy_model())
    prompt = Prompt(template=toy.TOY_TEMPLATE)
    train = read_pairs(data["train"], "xx-yy")[:32]
    test = read_pairs(data["test"], "xx-yy")
    requests = prompt.requests(tokenizer, [(pair.source, pair.pair) for pair in test])

    def right(removed: tuple[int, ...]) -> float:
        outputs = TransformersGenerator(model, tokenizer).generate(requests, removed)
        return sum(output.text == pair.target for output, pair in zip(outputs, test, strict=True)) / len(test)

    whole, forgetful = right(()), right((2, 4))
    assert whole > 0.9
    assert forgetful < 0.2
    joined = concatenate(ForcedScorer(model, examples_of(train, prompt, tokenizer)), (4,))
    assert joined[0].neurons[0] == 0, "nothing of the dead layer is worth keeping"
    assert right((2, 4)) > 0.9


def test_layers_without_norms_before_them_cannot_be_scaled():
    """What OLMo 2's make is not in proportion to their stream."""
    with pytest.raises(UserError, match="take another method"):
        compensate(scorer_for("olmo2"), REMOVED)


@pytest.mark.parametrize("family", sorted(set(toy.FAMILIES) - JOINED))
def test_what_cannot_be_taken_apart_is_refused(family):
    with pytest.raises(UserError, match="take another method"):
        concatenate(scorer_for(family), (2,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["compensate", "merge", "concatenate"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_gpu_mends_alike(family, method):
    """What is found and made on a GPU is what the CPU finds and makes, but for the order of sums."""
    made = []
    for device in ("cpu", "cuda"):
        scorer = ForcedScorer(load_model(toy.tiny_random(family), "float32", device), examples(), batch_size=4)
        mend(scorer, REMOVED, method)
        made.append(logits(scorer.model.to("cpu"), REMOVED))
    assert torch.allclose(*made, atol=1e-3)


def test_the_stage_makes_stock_checkpoints(toy_checkpoint, toy_data, tmp_path, ray_session):
    """Without both twins the toy model forgets its nouns; the dead layer between them takes one of them in."""
    from transformers import AutoModelForCausalLM

    sections = {
        "search": {"given": [2, 4]},
        "repair": {"methods": ["compensate", "merge", "concatenate"], "sentences": 24},
        "evaluate": {"metrics": ["chrF2++"]},
    }
    recipe = parse_recipe(toy_recipe(toy_checkpoint, toy_data, tmp_path / "run", **sections))
    told = io.StringIO()
    rundir = run(recipe, Reporter(told))
    models = {model["name"]: model for model in rundir.read_json("results.json")["models"]}
    assert list(models) == ["baseline", "pruned-6", "compensated-6", "merged-6", "concatenated-6"]
    for name in list(models)[1:]:
        path = rundir.local(f"models/{name}")
        assert len(AutoModelForCausalLM.from_pretrained(path).model.layers) == 6
        assert rundir.complete(f"models/{name}")
    scores = {name: model["scores"]["xx-yy"]["chrF2++"]["value"] for name, model in models.items()}
    assert scores["concatenated-6"] > 95 > 80 > scores["pruned-6"], scores
    card = read_card(rundir.local("models/compensated-6"))
    pairs = beside_examples(read_pairs(toy_data["train"], "xx-yy"), {}, 24)
    assert card["repair"] == {"method": "compensate", "sentences": 24, "sha256": text_hash(pairs)}
    assert set(card["found"]) == {"2", "4"}
    compared = {(c["a"], c["b"]) for c in rundir.read_json("results.json")["comparisons"]}
    assert ("concatenated-6", "pruned-6") in compared
    found = read_card(rundir.local("models/merged-6"))["found"]
    assert f"merged-6: {sum(tried['kept'] for tried in found)} of {len(found)} merges kept" in told.getvalue()
    before = (rundir.local("models/merged-6") / "model.safetensors").stat().st_mtime_ns
    run(recipe, Reporter(quiet=True))
    assert (rundir.local("models/merged-6") / "model.safetensors").stat().st_mtime_ns == before


def test_a_heal_starts_from_what_is_made(toy_checkpoint, toy_data, tmp_path):
    with pytest.raises(UserError, match="merge_above is about merging: add merge to methods"):
        sections = {"search": {"given": [1]}, "repair": {"methods": "compensate", "merge_above": 0.9}}
        parse_recipe(toy_recipe(toy_checkpoint, toy_data, tmp_path, **sections))
    with pytest.raises(UserError, match=r"heal.start: merged needs repair.methods to name 'merge'"):
        parse_recipe(toy_recipe(toy_checkpoint, toy_data, tmp_path, search={"given": [1]}, heal={"start": "merged"}))
