"""Drafts change how long generation takes, never what it says; and which requests are generated together."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from raylp.generate.base import REJOIN, Output, Request, continuation
from raylp.generate.batches import batches
from raylp.generate.transformers_view import TransformersGenerator
from raylp.models.load import load_model, load_tokenizer
from raylp.models.view import ByRow

PROMPTS = [
    "gofa tize beru mopi =",
    "gofa rather longer, longer than any sliding window =",
    "gofa tize =",
    "gofa =",
]
NEW = (24, 18, 24, 7)


def generator_for(path: Path, step_tokens: int) -> TransformersGenerator:
    return TransformersGenerator(load_model(path), load_tokenizer(path), step_tokens=step_tokens)


def requests_for(generator: TransformersGenerator) -> list[Request]:
    return [Request(tuple(generator.tokenizer(p).input_ids), n) for p, n in zip(PROMPTS, NEW, strict=True)]


@contextmanager
def passes_of(generator: TransformersGenerator) -> Iterator[list[None]]:
    """As many entries as the model is run."""
    passes: list[None] = []
    hook = generator.model.register_forward_pre_hook(lambda *_: passes.append(None))
    yield passes
    hook.remove()


def forwards(generator: TransformersGenerator, *asked: object) -> tuple[list[Output], int]:
    """What `generate` returns, and how often it ran the model."""
    with passes_of(generator) as passes:
        outputs = generator.generate(*asked)
    return outputs, len(passes)


def bad_drafts(right: Sequence[tuple[int, ...]], stop: int, seed: int = 0) -> dict[str, list[tuple[int, ...]]]:
    rng = random.Random(seed)
    noise = [tuple(rng.randrange(5, 60) for _ in row) for row in right]
    return {
        "wrong": noise,
        "too long": [row + row for row in right],
        "right in part": [
            row[: i + 2] + other[i + 2 :] for i, (row, other) in enumerate(zip(right, noise, strict=True))
        ],
        "a word too many": [(*row[:3], 9, 9, *row[3:]) for row in right],
        "a word missing": [row[:2] + row[4:] for row in right],
        "stops inside": [(*row[:4], stop, *row[4:]) for row in right],
        "for some rows": [row if i % 2 else () for i, row in enumerate(right)],
        "none": [() for _ in right],
    }


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_same_tokens_with_any_draft(family: str) -> None:
    """Rows take different lengths from their drafts, across sliding windows of 16 tokens and two layers left out."""
    generator = generator_for(toy.tiny_random(family), step_tokens=24)
    asked = requests_for(generator)
    plain, slow = forwards(generator, asked, [3, 1])
    right = [output.tokens for output in plain]
    assert max(len(r.tokens) + len(t) for r, t in zip(asked, right, strict=True)) > 2 * toy.SLIDING_WINDOW
    checked, quick = forwards(generator, asked, [3, 1], right)
    assert checked == plain and quick <= slow / 3
    for name, drafts in bad_drafts(right, min(generator.rule.stop)).items():
        assert generator.generate(asked, [3, 1], drafts) == plain, name
    assert generator.generate(asked, (), right) == generator.generate(asked), "the parent's draft for another view"


VIEWS = [[1], [2], [1, 3], [0], [5], [2]]  # some go without a layer that all others have, one twice


@pytest.mark.parametrize(("step_tokens", "batch_size"), [(1, 64), (64, 64), (1, 3)])
@pytest.mark.parametrize("family", toy.FAMILIES)
def test_views_that_share_a_batch_say_what_each_says_alone(family: str, step_tokens: int, batch_size: int) -> None:
    """Rows end at different times, until a layer has no row left that runs it; prompts share their beginning."""
    generator = generator_for(toy.tiny_random(family), step_tokens)
    generator.batch_size = batch_size
    asked = requests_for(generator)
    before = generator.generate(asked)
    parts = [asked, asked[:2], asked[1:], asked[3:], asked, asked[:1]]
    alone = [generator.generate(own, view) for own, view in zip(parts, VIEWS, strict=True)]
    drafts = [[output.tokens[: i + 3] for i, output in enumerate(outputs)] for outputs in alone]
    given = drafts if step_tokens > 1 else [None] * len(VIEWS)
    together = generator.generate_together(list(zip(parts, VIEWS, given, strict=True)))
    assert generator._by_row
    assert together == alone
    assert generator.generate(asked) == before, "the model is as it was"


def test_views_go_one_by_one_where_rows_cannot_be_told_apart_or_memory_is_short(toy_checkpoint: Path) -> None:
    """Bloom's layers are given positions of all heads of all rows in one dimension."""
    from transformers import AutoModelForCausalLM, BloomConfig

    tokenizer = toy.toy_tokenizer()
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=4, n_head=2)
    bloom = TransformersGenerator(AutoModelForCausalLM.from_config(config).eval(), tokenizer, step_tokens=1)
    short = generator_for(toy_checkpoint, step_tokens=1)
    short.max_slots = 4
    for generator, able in ((bloom, False), (short, True)):
        asked = requests_for(generator)
        views = [(asked, (layer,), None) for layer in (1, 2)]
        assert generator._by_row is able
        assert generator.generate_together(views) == [generator.generate(asked, removed) for _, removed, _ in views]


def test_rows_are_picked_on_every_device() -> None:
    """A model over several GPUs gives its layers arguments that lie elsewhere than their states."""
    by_row = ByRow()
    by_row.assign([{0}, set(), set()])
    states, mask = torch.arange(6.0).reshape(3, 2), torch.empty((3, 1), device="meta")
    seen = []

    def layer(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append((states.tolist(), tuple(mask.shape), mask.device.type))
        return -states

    assert by_row.run(0, layer, states, mask=mask).tolist() == [[0, 1], [-2, -3], [-4, -5]]
    assert by_row.run(1, layer, states, mask=mask).tolist() == (-states).tolist()
    assert seen[0] == ([[2, 3], [4, 5]], (2, 1), "meta") and len(seen[1][0]) == 3
    assert by_row.keep([0, 2]) == {0: [1]} and by_row.rows == {0: [1]}
    assert by_row.keep([0]) == {0: [0]} and by_row.idle == {0}
    assert by_row.run(0, layer, states[:1], mask=mask[:1]).tolist() == [[0, 1]], "without effect"


def test_a_shared_batch_takes_as_many_passes_as_its_longest_row(toy_checkpoint: Path) -> None:
    generator = generator_for(toy_checkpoint, step_tokens=1)
    generator.batch_size = 64
    prompts = [f"{row['source']} =" for row in toy.toy_pairs(8, 5)]
    asked = [Request(tuple(generator.tokenizer(prompt).input_ids), 16) for prompt in prompts]
    views = [(asked, (layer,), None) for layer in (1, 2, 3, 4)]
    alone = [forwards(generator, own, removed) for own, removed, _ in views]
    assert generator._by_row  # asked once, in a pass of its own
    with passes_of(generator) as passes:
        together = generator.generate_together(views)
    assert together == [outputs for outputs, _ in alone]
    assert len(passes) == max(alone_passes for _, alone_passes in alone)


def test_translations_with_drafts(toy_checkpoint: Path) -> None:
    """Real translations end by a stop: drafts that go on behind it, or stop before it, change nothing."""
    generator = generator_for(toy_checkpoint, step_tokens=64)
    prompts = [f"{row['source']} =" for row in toy.toy_pairs(12, 5)]
    asked = [Request(tuple(generator.tokenizer(prompt).input_ids), 16) for prompt in prompts]
    plain, slow = forwards(generator, asked)
    assert {output.finish for output in plain} == {"stop"}
    right = [output.tokens for output in plain]
    checked, quick = forwards(generator, asked, (), right)
    assert checked == plain and quick < slow / 2
    for name, drafts in bad_drafts(right, min(generator.rule.stop)).items():
        assert generator.generate(asked, (), drafts) == plain, name
    without = generator.generate(asked, toy.TRUTH.dead)
    assert generator.generate(asked, toy.TRUTH.dead, right) == without
    with pytest.raises(ValueError, match="1 drafts for 12"):
        generator.generate(asked, (), right[:1])


def test_a_family_that_cannot_take_tokens_back_goes_without() -> None:
    """A recurrent layer's state cannot be rewound: the draft is left aside, and the output is the same."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    tokenizer = toy.toy_tokenizer()
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = TransformersGenerator(AutoModelForCausalLM.from_config(config).eval(), tokenizer, step_tokens=64)
    asked = [Request(tuple(tokenizer("gofa tize =").input_ids), 8)]
    plain, slow = forwards(generator, asked)
    assert forwards(generator, asked, (), [plain[0].tokens]) == (plain, slow)


def test_what_a_draft_says_next() -> None:
    draft = (1, 2, 3, 4, 5, 6, 3, 4, 8)
    assert continuation(draft, (), 3) == [1, 2, 3]
    assert continuation(draft, (1, 2), 3) == [3, 4, 5]
    assert continuation(draft, (1, 2, 9), 3) == []
    assert continuation(draft, (1, 2, 9, 3, 4), 3) == [5, 6, 3]  # the nearer one of two places
    assert continuation(draft, (1, 2, 9, 9, 9, 3, 4), 3) == [8]
    assert continuation(draft, draft, 3) == continuation((), (), 3) == continuation(draft, (), 0) == []


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12), st.integers(-1, 5))
def test_a_draft_never_says_more_than_it_holds(draft: list[int], tokens: list[int], most: int) -> None:
    said = continuation(draft, tokens, most)
    assert len(said) <= max(0, most)
    starts = [i for i in range(len(draft) + 1) if draft[i : i + len(said)] == said]
    before = [i for i in starts if i == len(tokens) or draft[max(0, i - REJOIN) : i] == tokens[-REJOIN:]]
    assert not said or before


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_batches_hold_every_request_within_the_bounds(
    sizes: list[tuple[int, int]], rows: int, slots: int | None
) -> None:
    requests = [Request((0,) * prompt, new) for prompt, new in sizes]
    found = batches(requests, rows, slots)
    assert sorted(i for batch in found for i in batch) == list(range(len(requests)))
    lengths = [len(requests[i].tokens) for batch in found for i in batch]
    assert lengths == sorted(lengths)
    for batch in found:
        widest = max(sizes[i][0] for i in batch) + max(sizes[i][1] for i in batch)
        assert len(batch) <= rows and (slots is None or len(batch) == 1 or len(batch) * widest <= slots)


def test_batches_are_no_smaller_than_they_must_be() -> None:
    requests = [Request((0,) * 10, 10)] * 8
    assert [len(batch) for batch in batches(requests, 16)] == [8]
    assert [len(batch) for batch in batches(requests, 3)] == [3, 3, 2]
    assert [len(batch) for batch in batches(requests, 16, 100)] == [5, 3]
