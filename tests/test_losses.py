"""Losses against a teacher: torch's own divergence, sums that do not depend on rows, and layers that do nothing."""

from dataclasses import replace

import pytest
import torch
import toy
from test_heal import random_examples

from raylp.data.tokens import Example, Top
from raylp.errors import UserError
from raylp.heal.config import Loss
from raylp.heal.losses import Teacher, correspondence, distance, divergence, losses
from raylp.heal.pack import loss_sum
from raylp.models.load import load_model
from raylp.models.stack import text_config
from raylp.models.view import without_layers
from raylp.recipe import parse_recipe

ALL = Loss(distillation=1.0, hidden=1.0, top_k=None)


def some_logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(7, 50, generator=torch.manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_torch_s_own(temperature):
    ours, theirs = some_logits(0), some_logits(1)
    p, q = ((x / temperature).log_softmax(-1) for x in (theirs, ours))
    forward = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") * temperature**2
    reverse = torch.nn.functional.kl_div(p, q, log_target=True, reduction="sum") * temperature**2
    for top_k in (None, 50):
        options = Loss(distillation=1, top_k=top_k, temperature=temperature)
        assert float(divergence(ours, theirs, options)) == pytest.approx(float(forward), rel=1e-5)
        options = options.model_copy(update={"direction": "reverse"})
        assert float(divergence(ours, theirs, options)) == pytest.approx(float(reverse), rel=1e-5)


def test_few_words_stand_for_a_sure_teacher():
    """A teacher with nearly all its probability on few words: these are enough, and tell as little as its entropy."""
    ours, theirs = some_logits(0), some_logits(1)
    theirs[:, :4] += 30
    whole = divergence(ours, theirs, Loss(distillation=1, top_k=None))
    few = divergence(ours, theirs, Loss(distillation=1, top_k=4))
    assert float(few) == pytest.approx(float(whole), rel=1e-4)
    sure = theirs.clone()
    sure[:, 0] += 100
    weighted = Loss(distillation=1, top_k=4, entropy_weighted=True)
    assert float(divergence(ours, sure, weighted)) == pytest.approx(0, abs=1e-4)
    assert 0 < float(divergence(ours, theirs, weighted)) < float(few)


def test_the_minimum_is_the_teacher():
    theirs = some_logits(1)
    for direction in ("forward", "reverse"):
        ours = some_logits(0).requires_grad_()
        optimizer = torch.optim.Adam([ours], lr=0.1)
        for _ in range(400):
            optimizer.zero_grad()
            divergence(ours, theirs, Loss(distillation=1, top_k=None, direction=direction)).backward()
            optimizer.step()
        assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-2)


def test_distance_is_a_share():
    states = torch.randn(5, 8, generator=torch.manual_seed(0))
    assert float(distance(1.1 * states, states)) == pytest.approx(5 * 0.01, rel=1e-4)


def test_a_layer_stands_for_those_removed_behind_it():
    assert correspondence(8, (3, 6)) == (0, 1, 3, 4, 6, 7)
    assert correspondence(5, (2, 3)) == (0, 3, 4)
    assert correspondence(5, (0, 4)) == (1, 2, 4)


def test_without_dead_layers_nothing_is_to_learn(toy_checkpoint):
    """Words and states of the toy model are the same without its dead layers, and are not without a living one."""
    student, teacher = load_model(toy_checkpoint), load_model(toy_checkpoint)
    examples = random_examples(6, pairs=1)
    config = text_config(student)
    for removed, same in ((toy.TRUTH.dead, True), ((5,), False)):
        with without_layers(student, removed):
            taught = Teacher(teacher, correspondence(toy.TRUTH.num_layers, removed))
            layers = student.model.layers
            found = losses(student, examples, config, True, 0, ALL, taught, layers)
            alone = loss_sum(student, examples, config, True)
        assert float(found["cross_entropy"]) == pytest.approx(float(alone), rel=1e-6)
        assert (float(found["distillation"]) < 1e-3) is same, found
        assert (float(found["hidden"]) < 1e-3) is same, found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma3", "cohere2"])
def test_sums_do_not_depend_on_rows(family):
    student, teacher = (load_model(toy.tiny_random(family)).double() for _ in range(2))
    examples = random_examples(6)
    with without_layers(student, (2, 3)):
        taught = Teacher(teacher, correspondence(6, (2, 3)))
        options = ALL.model_copy(update={"top_k": 16, "entropy_weighted": True})
        layers = student.get_decoder().layers
        ways = [
            losses(student, some, text_config(student), packed, 0, options, taught, layers)
            for packed, some in ((True, examples), (False, examples), (True, examples[:2]), (True, examples[2:]))
        ]
    packed, padded, *parts = ways
    for name in ("cross_entropy", "distillation", "hidden"):
        assert float(padded[name]) == pytest.approx(float(packed[name]), rel=1e-4)
        assert float(sum(part[name] for part in parts)) == pytest.approx(float(packed[name]), rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_what_is_stored_teaches_as_the_teacher_itself(packed, direction):
    """The first words of the teacher, kept for some of the examples: the same divergence on those, none on the rest."""
    student, teacher = load_model(toy.tiny_random("llama")).double(), load_model(toy.tiny_random("llama"))
    examples = random_examples(5)
    config = text_config(student)
    options = Loss(distillation=1.0, top_k=8, direction=direction, temperature=1.5)

    def kept(example: Example) -> Example:
        tokens = torch.tensor([[*example.prompt, *example.target]])
        with torch.no_grad():
            logits = teacher(input_ids=tokens, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
        values, ids = logits.log_softmax(-1).topk(8)
        return replace(example, top=Top(ids.int().numpy(), values.half().numpy()))

    some = [kept(example) if place % 2 else example for place, example in enumerate(examples)]
    with without_layers(student, (2, 3)):
        found = losses(student, some, config, packed, 0, options.model_copy(update={"teacher": "stored"}))
        taught = Teacher(teacher, correspondence(6, (2, 3)))
        wanted = losses(student, examples[1::2], config, packed, 0, options, taught)
        none = losses(student, examples, config, packed, 0, options.model_copy(update={"teacher": "stored"}))
    assert float(found["distillation"]) == pytest.approx(float(wanted["distillation"]), rel=0.02)
    assert float(none["distillation"]) == 0


def test_a_loss_of_nothing_is_refused(toy_checkpoint, toy_data, tmp_path):
    from conftest import toy_recipe

    with pytest.raises(UserError, match="nothing counts"):
        parse_recipe(
            toy_recipe(toy_checkpoint, toy_data, tmp_path, search={"given": [1]}, heal={"loss": {"cross_entropy": 0}})
        )
