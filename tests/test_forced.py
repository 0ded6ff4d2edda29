"""Teacher-forced scores: the prefix sweep is the plain way to the bit, and the plain way is what transformers says."""

import random
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
from raylp.search.forced import Cost, ForcedScorer, make_batches, plain_cost, sweep_cost

BATCH = 4


def some_examples(count: int = 10, shared: int = 0) -> list[Example]:
    """Prompts of 3 to 24 tokens behind `shared` equal ones, targets of 1 to 14; the sliding window is 16 tokens."""
    rng = random.Random(0)

    def tokens(most: int, least: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 300) for _ in range(rng.randint(least, most)))

    beginning = tokens(shared, shared)
    return [Example(beginning + tokens(24, 3), tokens(14, 1)) for _ in range(count)]


def scorer_for(family: str, shared: int = 0, **options: int) -> ForcedScorer:
    model = load_model(toy.tiny_random(family))
    return ForcedScorer(model, some_examples(shared=shared), **{"batch_size": BATCH, **options})


def best(swept: dict[int, np.ndarray]) -> int:
    return max(swept, key=lambda layer: (swept[layer][:, 0].sum(), -layer))


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("family", toy.FAMILIES)
def test_sweep_is_the_plain_way_to_the_bit(family: str, shared: int) -> None:
    """Three rounds: afresh, on the states of the best layer, and on those before a layer that was not the best."""
    scorer = scorer_for(family, shared)
    plain = ForcedScorer(scorer.model, some_examples(shared=shared), batch_size=BATCH)
    before = scorer.model.config.to_dict()
    removed: tuple[int, ...] = ()
    for step in range(3):
        alive = scorer.alive(removed)
        swept = scorer.sweep(removed, alive)
        for layer in alive:
            assert np.array_equal(swept[layer], plain.score((*removed, layer))), layer
        assert len({tuple(rows[:, 0]) for rows in swept.values()}) == len(alive)
        removed = (*removed, alive[1] if step == 1 else best(swept))
    layers = scorer.alive(removed)
    closer = scorer.sweep(removed, layers, "agreement")
    for layer in layers:
        assert np.array_equal(closer[layer], plain.score((*removed, layer), "agreement"))
    assert scorer.model.config.to_dict() == before


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("family", toy.FAMILIES)
def test_score_is_transformers_own_loss(family: str, shared: int) -> None:
    scorer = scorer_for(family, shared)
    for removed in ((), (3, 1)):
        rows = scorer.score(removed)
        pruned = toy.without_layers(scorer.model, removed)
        for example, (total, count) in zip(some_examples(shared=shared), rows, strict=True):
            tokens = torch.tensor([example.prompt + example.target])
            labels = tokens.clone()
            labels[:, : len(example.prompt)] = -100
            loss = float(pruned(input_ids=tokens, labels=labels, use_cache=False).loss)
            assert count == len(example.target)
            assert -total / count == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "gpt2"])
def test_agreement_is_the_divergence_from_the_whole_model(family: str) -> None:
    scorer = scorer_for(family)
    same = scorer.score((), "agreement")
    assert np.array_equal(same, [[0, len(example.target)] for example in some_examples()])
    rows = scorer.score((2,), "agreement")
    pruned = toy.without_layers(scorer.model, (2,))
    for example, (total, _) in zip(some_examples(), rows, strict=True):
        tokens, places = torch.tensor([example.prompt + example.target]), slice(len(example.prompt) - 1, -1)
        first, second = (
            model(input_ids=tokens, use_cache=False).logits[0, places].double().log_softmax(-1)
            for model in (scorer.model, pruned)
        )
        assert total == pytest.approx(float((first.exp() * (first - second)).sum()), rel=1e-4)
        assert total > 0


def test_chunks_and_memory_change_no_more_than_the_work() -> None:
    """Words projected a few positions at a time, and no room for states: the same scores, more layers run."""
    roomy, narrow = scorer_for("gemma3_text"), scorer_for("gemma3_text", keep_bytes=0, logits_bytes=1 << 14)
    assert narrow.chunk < narrow.num_targets < roomy.chunk
    removed: tuple[int, ...] = ()
    for _ in range(2):
        layers = roomy.alive(removed)
        first, second = roomy.sweep(removed, layers), narrow.sweep(removed, layers)
        for layer in layers:
            np.testing.assert_allclose(first[layer], second[layer], rtol=1e-5)
        assert len(narrow._states) <= 1
        removed = (*removed, best(first))
    assert narrow.spent == sweep_cost(6, range(6)) + sweep_cost(5, range(5))
    assert roomy.spent == sweep_cost(6, range(6)) + sweep_cost(5, range(5), known=4)


@pytest.mark.parametrize("room", range(12))
def test_states_stay_within_their_bound(room: int) -> None:
    scorer = scorer_for("llama")
    plain = ForcedScorer(scorer.model, some_examples(), batch_size=BATCH)
    scorer._room = room
    removed: tuple[int, ...] = ()
    for _ in range(3):
        layers = scorer.alive(removed)[1:-1]
        swept = scorer.sweep(removed, layers)
        assert len(scorer._states) <= max(1, room)
        removed = (*removed, best(swept))
        assert np.array_equal(swept[removed[-1]], plain.score(removed))


def test_what_is_spent_is_what_the_formulas_say() -> None:
    """The published 32 to 16: 8,800 units plain; by sweep half of it, and the pass that all candidates share."""
    assert plain_cost(32, 30) == Cost(930, 30)
    assert sweep_cost(32, range(1, 31)) == Cost(495, 30)
    assert sweep_cost(32, range(1, 31), known=31) == Cost(465, 30)
    rounds = range(32, 16, -1)
    assert sum(plain_cost(n, n - 2).layers for n in rounds) == 8800
    # 4,792 in all where each round scores the whole model too; that pass needs 2 layers more than the last candidate.
    assert sum(sweep_cost(n, range(1, n - 1)).layers + 2 for n in rounds) == 4792

    scorer = scorer_for("llama")
    scorer.score((2,))
    assert scorer.spent == Cost(5, 1)
    scorer.sweep((2,), [4, 1])
    assert scorer.spent == Cost(5, 1) + sweep_cost(5, [1, 3])
    assert list(scorer.sweep((2,), [5, 3])) == [5, 3]


def test_layers_that_return_more_than_states() -> None:
    """Bloom's give a tuple: what stands for them in the middle of the model does as well."""
    from transformers import BloomConfig, BloomForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=64, n_layer=4, n_head=4)).eval()
    scorer = ForcedScorer(model, some_examples(shared=9), batch_size=BATCH)
    swept = scorer.sweep((1,), (0, 2, 3))
    for layer, rows in swept.items():
        assert np.array_equal(rows, scorer.score((1, layer)))


def test_what_prompts_begin_with_is_computed_once() -> None:
    examples = some_examples(shared=9)
    shared, whole = scorer_for("llama", 9), scorer_for("llama", 9, share_prefix=False)
    assert whole.num_tokens - shared.num_tokens == 9 * (len(examples) - 1)
    window = [(scorer_for("gemma2", length)).num_tokens for length in (15, 16)]
    assert window[1] - window[0] > 15 * (len(examples) - 1)


def test_batches_hold_examples_of_like_length() -> None:
    examples = some_examples()
    batches = make_batches(examples, BATCH, "cpu")
    assert sorted(i for batch in batches for i in batch.numbers) == list(range(len(examples)))
    assert [len(batch.numbers) for batch in batches] == [4, 4, 2]
    lengths = [examples[i].length for batch in batches for i in batch.numbers]
    assert lengths == sorted(lengths)
    for batch in batches:
        predicted = batch.tokens[batch.rows, (batch.places + 1).clamp(max=batch.tokens.shape[1] - 1)]
        inside = batch.places < batch.ends[batch.rows]
        assert torch.equal(predicted[inside], batch.targets[inside])
        assert [tuple(batch.targets[batch.owners == i].tolist()) for i in batch.numbers] == [
            examples[i].target for i in batch.numbers
        ]


def test_dead_layers_are_missed_least(toy_checkpoint: Path, toy_data: dict[str, Path]) -> None:
    model, tokenizer = load_model(toy_checkpoint), load_tokenizer(toy_checkpoint)
    pairs = read_pairs(toy_data["search"], "xx-yy")[:24]
    scorer = ForcedScorer(model, examples_of(pairs, Prompt(template=toy.TOY_TEMPLATE), tokenizer))
    whole = scorer.score()
    assert whole[:, 0].sum() / whole[:, 1].sum() > -0.2
    for objective, value in (("likelihood", whole[:, 0].sum()), ("agreement", 0.0)):
        swept = scorer.sweep((), range(8), objective)
        totals = {layer: abs(rows[:, 0].sum() - value) for layer, rows in swept.items()}
        assert {layer for layer, total in totals.items() if total < 1e-3} == set(toy.TRUTH.dead)


def test_weights_are_not_written(toy_checkpoint: Path) -> None:
    model = load_model(toy_checkpoint)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    scorer = ForcedScorer(model, some_examples())
    scorer.sweep((), range(8))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_nothing_to_score() -> None:
    model = load_model(toy.tiny_random("llama"))
    with pytest.raises(UserError, match="no sentences"):
        ForcedScorer(model, [])
    with pytest.raises(UserError, match="sentence 0"):
        ForcedScorer(model, [Example((1, 2), ())])
    scorer = ForcedScorer(model, some_examples(2))
    with pytest.raises(UserError, match="twice"):
        scorer.sweep((1,), [1, 2])
    with pytest.raises(UserError, match="at least one"):
        scorer.sweep((0, 1, 2, 3, 4), [5])
