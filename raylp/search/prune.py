"""Cut the layers of plan.json out of the baseline, and prove the checkpoint right before it counts as there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.context import Context
from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.models.checkpoint import card_for, count_parameters, read_card, save_checkpoint
from raylp.models.load import load_model, load_tokenizer, stored_dtype
from raylp.models.source import fingerprint

PROOF_SENTENCES = 4


def prune(context: Context) -> dict[str, Any]:
    """Writes models/pruned-N for every N layers that the plan says may stay."""
    made = make_models(context, "pruned", cut_and_prove)
    return {**made[-1], "models": made}


def make_models(
    context: Context, kind: str, make: Callable[..., None], further: dict[str, Any] | None = None, *more: Any
) -> list[dict[str, Any]]:
    """Writes models/<kind>-N, unless it is there, for every N layers that the plan says may stay.

    `make(source, target, card, prompt, sentences, *more)` is called in a process of its own; it must write the card, to
    which it may add. `further`: what else belongs into it.
    """
    plan = context.rundir.read_json("plan.json")
    depths = plan.get("depths") or [{"layers": plan["num_layers"] - len(plan["removed"]), "removed": plan["removed"]}]
    tests = [example for examples in context.splits.test.values() for example in examples]
    examples = (context.splits.search or context.splits.train or tests)[:PROOF_SENTENCES]
    sentences = [(example.source, example.pair) for example in examples]
    cluster.start(context.recipe.resources)
    prompt = context.prompt.model_dump(mode="json")
    print_of = fingerprint(context.baseline)
    made = []
    for depth in depths:
        card = card_for(context.recipe.model.name, print_of, plan["stack"], depth["removed"], prompt)
        name = f"{kind}-{depth['layers']}"
        _make(context, name, make, {**card, **(further or {})}, sentences, more)
        parameters, size = count_parameters(context.rundir.local(f"models/{name}"))
        made.append({"model": name, "parameters": parameters, "bytes": size})
    return made


def _make(
    context: Context,
    name: str,
    make: Callable[..., None],
    card: dict[str, Any],
    sentences: Sequence[tuple[str, str]],
    more: Sequence[Any],
) -> None:
    import ray

    if context.rundir.complete(f"models/{name}"):
        there = read_card(context.rundir.local(f"models/{name}")) or {}
        if {key: there.get(key) for key in card} == card:
            return
    source, prompt = context.baseline, context.prompt
    with context.reporter.task(f"make {name}") as task, context.rundir.building(f"models/{name}") as target:
        work = ray.remote(num_cpus=1, max_retries=0)(make).remote(source, target, card, prompt, sentences, *more)
        while not ray.wait([work], timeout=2)[0]:
            task.beat()
        try:
            ray.get(work)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from error


def cut_and_prove(
    source: Path, target: Path, card: dict[str, Any], prompt: Prompt, sentences: Sequence[tuple[str, str]]
) -> None:
    """Saves `source` without `card["removed"]` in `target`, loads it again, and compares it with the view it is of.

    Raises:
        UserError: the two do not give the same tokens for `sentences`.
    """
    save_and_prove(load_model(source, stored_dtype(source)), source, target, card, prompt, sentences)


def save_and_prove(
    model: Any, source: Path, target: Path, card: dict[str, Any], prompt: Prompt, sentences: Sequence[tuple[str, str]]
) -> None:
    """Saves `model`, which came from `source`, without `card["removed"]`, as `cut_and_prove` does."""
    from raylp.generate.transformers_view import TransformersGenerator

    dtype, tokenizer = stored_dtype(source), load_tokenizer(source)
    save_checkpoint(model, source, target, card, card["removed"])
    requests = prompt.requests(tokenizer, sentences)
    seen = TransformersGenerator(model, tokenizer, prompt.newline).generate(requests, card["removed"])
    del model
    reloaded = TransformersGenerator(load_model(target, dtype), load_tokenizer(target), prompt.newline)
    for before, after in zip(seen, reloaded.generate(requests), strict=True):
        if before.tokens != after.tokens:
            raise UserError(
                f"the checkpoint {target.name} does not give the tokens of the view it was cut from ({before.text!r}, "
                f"{after.text!r}): please report this architecture",
                1,
            )
