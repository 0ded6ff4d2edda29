"""The cheap criteria against their formulas computed the long way, and against layers known to be dead."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

from raylp.data.corpus import read_pairs
from raylp.data.prompt import Prompt
from raylp.data.tokens import Example, examples_of
from raylp.errors import UserError
from raylp.models.load import load_model, load_tokenizer
from raylp.search.criteria import angular_blocks, importance
from raylp.search.forced import ForcedScorer
from raylp.search.plan import lowest_first

EXAMPLES = [
    Example((5, 17, 250, 99), (31, 32, 33)),
    Example((7, 8), (120, 4)),
    Example(tuple(range(40, 60)), (201, 202, 203, 204, 205)),
]
REMOVED = (3,)
ALIVE = [0, 1, 2, 4, 5]
# Families whose layers are built differently: norms before and after, branches side by side, experts, biases.
SHAPES = ["llama", "gemma3_text", "gemma3", "cohere2", "gpt2", "opt", "phi3", "mixtral"]


def scorer_for(family: str, dtype: str = "float32") -> ForcedScorer:
    return ForcedScorer(load_model(toy.tiny_random(family)).to(getattr(torch, dtype)), EXAMPLES, batch_size=2)


def states(model: torch.nn.Module, example: Example) -> list[torch.Tensor]:
    """The input of every layer of a pruned copy and the last one's output, each (length, size), of one sentence."""
    found: list[torch.Tensor] = []
    layers = toy._layers(model)
    handles = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0])) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda _, __, output: found.append(output[0])))
    with torch.no_grad():
        model(input_ids=torch.tensor([[*example.prompt, *example.target[:-1]]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [state.double() for state in found]


def mean_loss(model: torch.nn.Module) -> torch.Tensor:
    """Of all targets' tokens, sentence by sentence."""
    total = torch.zeros((), dtype=torch.double)
    for example in EXAMPLES:
        tokens = torch.tensor([example.prompt + example.target])
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(example.prompt) - 1 : -1].double()
        total = total - logits.log_softmax(-1)[range(len(example.target)), list(example.target)].sum()
    return total / sum(len(example.target) for example in EXAMPLES)


@pytest.mark.parametrize("family", SHAPES)
def test_block_influence_and_angles(family: str) -> None:
    scorer = scorer_for(family)
    walks = [states(toy.without_layers(scorer.model, REMOVED), example) for example in EXAMPLES]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

    influence = importance("block_influence", scorer, REMOVED)
    single, blocks = importance("angular", scorer, REMOVED), angular_blocks(scorer, REMOVED, 3)
    assert list(influence) == list(single) == ALIVE
    assert list(blocks) == ALIVE[:3]
    for place, layer in enumerate(ALIVE):
        cosines = torch.cat([cosine(walk[place], walk[place + 1]) for walk in walks])
        assert influence[layer] == pytest.approx(1 - float(cosines.mean()), rel=1e-3)
        for size, found in ((1, single), (3, blocks)):
            if layer in found:
                angles = [math.acos(cosine(walk[place][-1], walk[place + size][-1])) / math.pi for walk in walks]
                assert found[layer] == pytest.approx(sum(angles) / len(angles), rel=1e-3)


@pytest.mark.parametrize("family", SHAPES)
def test_gate_taylor_is_the_slope_of_a_gate(family: str) -> None:
    """Against central differences with a real gate around each layer, in float64."""
    scorer = scorer_for(family, "float64")
    if family == "mixtral":  # the faster way to run experts knows float32 only
        scorer.model.set_experts_implementation("eager")
    found = importance("gate_taylor", scorer, REMOVED)
    pruned = toy.without_layers(scorer.model, REMOVED)
    # Root mean square norms compute in float32 whatever they are given; OPT's activation has a kink.
    step = 1e-5 if family == "opt" else 3e-3
    for layer, module in zip(ALIVE, toy._layers(pruned), strict=True):
        losses = []
        for gate in (1 - step, 1 + step):
            handle = module.register_forward_hook(
                lambda _, args, output, gate=gate: args[0] + gate * (output - args[0])
            )
            with torch.no_grad():
                losses.append(float(mean_loss(pruned)))
            handle.remove()
        assert found[layer] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_magnitude_and_taylor_are_sums_over_matrices(family: str) -> None:
    scorer = scorer_for(family)
    magnitude, taylor = (importance(name, scorer, REMOVED) for name in ("magnitude", "taylor"))
    assert not any(weight.requires_grad or weight.grad is not None for weight in scorer.model.parameters())
    pruned = toy.without_layers(scorer.model, REMOVED).requires_grad_(True)
    mean_loss(pruned).backward()
    for layer, module in zip(ALIVE, toy._layers(pruned), strict=True):
        matrices = [weight for weight in module.parameters() if weight.ndim > 1]
        assert magnitude[layer] == pytest.approx(sum(float(w.detach().abs().sum()) for w in matrices), rel=1e-5)
        products = sum(float((w.detach() * w.grad).abs().sum()) for w in matrices if w.grad is not None)
        assert taylor[layer] == pytest.approx(products, rel=1e-3)


# By hand, for each way to build a layer: what attention and the MLP add to the stream.
ENDS = {
    "llama": ("self_attn", "mlp"),
    "mixtral": ("self_attn", "mlp"),
    "phi3": ("self_attn", "mlp"),
    "cohere2": ("self_attn", "mlp"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
}


@pytest.mark.parametrize("family", SHAPES)
def test_information_flow_routes(family: str) -> None:
    scorer = scorer_for(family)
    found = importance("ifr", scorer, REMOVED)
    pruned = toy.without_layers(scorer.model, REMOVED)
    outputs: list[np.ndarray] = []
    for layer in toy._layers(pruned):
        for name in ENDS[family]:
            layer.get_submodule(name).register_forward_hook(
                lambda _, __, output: outputs.append(
                    (output[0] if isinstance(output, tuple) else output).reshape(-1, 64).double().numpy()
                )
            )
    shares: list[list[float]] = [[] for _ in ALIVE]

    def prox(part: np.ndarray, whole: np.ndarray) -> float:
        return max(np.abs(whole).sum() - np.abs(whole - part).sum(), 0.0)

    for example in EXAMPLES:
        outputs.clear()
        walk = states(pruned, example)
        for place, inputs in enumerate(walk[:-1]):
            attention, mlp = outputs[2 * place], outputs[2 * place + 1]
            for x, a, m in zip(inputs.numpy(), attention, mlp, strict=True):
                share = prox(a, x + a) / (prox(a, x + a) + prox(x, x + a))
                middle = x + a
                share += prox(m, middle + m) / (prox(m, middle + m) + prox(middle, middle + m))
                shares[place].append(share)
    for layer, values in zip(ALIVE, shares, strict=True):
        assert 0 < found[layer] < 2
        assert found[layer] == pytest.approx(float(np.mean(values)), rel=1e-4)


def test_layers_that_add_nothing_to_their_input_have_no_routes() -> None:
    scorer = scorer_for("llama")
    scorer.layers[2].register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(UserError, match="ifr"):
        importance("ifr", scorer)


def test_perplexity_is_that_of_the_model_without_the_layer() -> None:
    scorer = scorer_for("qwen3")
    found = importance("perplexity", scorer, REMOVED)
    for layer in ALIVE:
        with torch.no_grad():
            loss = float(mean_loss(toy.without_layers(scorer.model, (*REMOVED, layer))))
        assert found[layer] == pytest.approx(math.exp(loss), rel=1e-4)


def test_blind_baselines() -> None:
    scorer = scorer_for("llama")
    assert lowest_first(importance("tail", scorer)) == [5, 4, 3, 2, 1, 0]
    assert lowest_first(importance("tail", scorer, (5,))) == [4, 3, 2, 1, 0]
    assert sorted(lowest_first(importance("middle", scorer))[:4]) == [1, 2, 3, 4]
    orders = {tuple(lowest_first(importance("random", scorer, seed=seed))) for seed in range(8)}
    assert len(orders) > 4
    whole = lowest_first(importance("random", scorer, seed=1))
    assert lowest_first(importance("random", scorer, (whole[0],), seed=1)) == whole[1:]


def test_ends_are_kept_by_the_plus_variants() -> None:
    model = load_model(toy.tiny_random("llama", num_layers=9))
    scorer = ForcedScorer(model, EXAMPLES)
    values = importance("magnitude", scorer, (1,), plus=True)
    assert [layer for layer, value in values.items() if value == math.inf] == [0, 2, 3, 4, 7, 8]
    assert {layer: values[layer] for layer in (5, 6)} == {
        layer: value for layer, value in importance("magnitude", scorer, (1,)).items() if layer in (5, 6)
    }


def test_unknown_criterion_and_block() -> None:
    scorer = scorer_for("llama")
    with pytest.raises(UserError, match="block_influence"):
        importance("shapley", scorer)
    with pytest.raises(UserError, match="ask for 1 to 5"):
        angular_blocks(scorer, REMOVED, 6)


def test_dead_layers_are_found(toy_checkpoint: Path, toy_data: dict[str, Path]) -> None:
    """By every criterion that looks at what a layer does; what they say of a dead layer is exactly nothing."""
    model, tokenizer = load_model(toy_checkpoint), load_tokenizer(toy_checkpoint)
    pairs = read_pairs(toy_data["search"], "xx-yy")[:24]
    scorer = ForcedScorer(model, examples_of(pairs, Prompt(template=toy.TOY_TEMPLATE), tokenizer))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    dead = set(toy.TRUTH.dead)
    for name in ("block_influence", "angular", "ifr", "perplexity", "taylor", "magnitude"):
        assert set(lowest_first(importance(name, scorer))[:2]) == dead, name
    gates = importance("gate_taylor", scorer)
    assert {layer for layer, value in gates.items() if value == 0} == dead
    for name in ("block_influence", "ifr"):
        values = importance(name, scorer)
        assert all(values[layer] == pytest.approx(0, abs=1e-12) for layer in dead)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
