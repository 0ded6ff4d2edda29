"""A candidate healed for a few steps, to see what it would be worth afterwards: rankings may flip.

Adapters are put into the resident model, trained, used to translate, and taken out again; the weights themselves stay
as they are. (Model-Optimizer's authors report that the order of candidates changes with healing.)
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from raylp.config import Section
from raylp.data.tokens import Example
from raylp.heal.config import Heal
from raylp.heal.pack import loss_sum, why_not_packed
from raylp.heal.plan import learning_rate
from raylp.heal.trainable import make_trainable
from raylp.models.stack import text_config
from raylp.models.view import without_layers


class ShortHeal(Section):
    """`best`: how many of a round's candidates are healed before one is chosen; `steps` of `batch_size` pairs each."""

    best: int = Field(3, ge=1)
    steps: int = Field(24, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    rank: int = Field(16, ge=1)
    seed: int = 0


def chosen_examples(examples: Sequence[Example], options: ShortHeal) -> list[list[Example]]:
    """The batches of every step, each pair as seldom as possible."""
    order = list(range(len(examples)))
    shuffled: list[int] = []
    for turn in range(-(-options.steps * options.batch_size // max(1, len(examples)))):
        random.Random(f"{options.seed}/{turn}").shuffle(order)
        shuffled += order
    size = options.batch_size
    return [[examples[i] for i in shuffled[s * size : (s + 1) * size]] for s in range(options.steps)]


@contextmanager
def healed(
    model: Any, removed: Sequence[int], batches: Sequence[Sequence[Example]], options: ShortHeal
) -> Iterator[Any]:
    """`model` without the layers `removed`, its adapters trained on `batches`, until the block ends."""
    import torch

    with without_layers(model, removed):
        torch.manual_seed(options.seed)
        config = Heal.model_validate({"method": "lora", "lora": {"rank": options.rank, "alpha": 2 * options.rank}})
        adapted = make_trainable(model, config)
        try:
            _train(adapted, batches, options)
            adapted.eval()
            yield model
        finally:
            adapted.unload()
            model.requires_grad_(False)


def _train(model: Any, batches: Sequence[Sequence[Example]], options: ShortHeal) -> None:
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    config = text_config(model)
    packed = why_not_packed(model, [example for batch in batches for example in batch], config) is None
    model.train()
    with torch.enable_grad():
        for step, batch in enumerate(batches, start=1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(batches), options.learning_rate, 0.1, "linear")
            tokens = sum(len(example.target) for example in batch)
            loss = loss_sum(model, batch, config, packed) / tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
