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


def prune_leg(context: Context, stop: int, before: int) -> None:
    """Writes models/pruned-<stop> from models/healed-<before>, by the leg's plan."""
    leg = context.rundir.read_json(f"legs/{stop}/plan.json")
    depths = {depth["layers"]: depth["removed"] for depth in context.rundir.read_json("plan.json")["depths"]}
    source = context.rundir.local(f"models/healed-{before}")
    prompt = context.prompt.model_dump(mode="json")
    card = card_for(context.recipe.model.name, fingerprint(context.baseline), leg["stack"], depths[stop], prompt)
    # Another healing of the same layers is another model.
    card |= {"from": fingerprint(source)}
    cluster.start(context.recipe.resources)
    _make(context, f"pruned-{stop}", cut_and_prove, source, card, _to_prove_on(context), (leg["removed"],))


def make_models(
    context: Context,
    kind: str,
    make: Callable[..., None],
    further: dict[str, Any] | None = None,
    *more: Any,
    gpus: float = 0.0,
) -> list[dict[str, Any]]:
    """Writes models/<kind>-N, unless it is there, for every N layers that the plan says may stay.

    `make(source, target, card, prompt, sentences, *more)` is called in a process of its own; it must write the card, to
    which it may add. `further`: what else belongs into it; `gpus`: that the process may use.
    """
    plan = context.rundir.read_json("plan.json")
    # Those of later legs come from healed models.
    depths = (
        plan["depths"][: 1 if "legs" in plan else None]
        if plan.get("depths")
        else [{"layers": plan["num_layers"] - len(plan["removed"]), "removed": plan["removed"]}]
    )
    sentences = _to_prove_on(context)
    cluster.start(context.recipe.resources)
    prompt = context.prompt.model_dump(mode="json")
    print_of = fingerprint(context.baseline)
    made = []
    for depth in depths:
        card = card_for(context.recipe.model.name, print_of, plan["stack"], depth["removed"], prompt)
        name = f"{kind}-{depth['layers']}"
        _make(context, name, make, context.baseline, {**card, **(further or {})}, sentences, more, gpus)
        parameters, size = count_parameters(context.rundir.local(f"models/{name}"))
        made.append({"model": name, "parameters": parameters, "bytes": size})
    return made


def _to_prove_on(context: Context) -> list[tuple[str, str]]:
    """A few sentences and their pairs."""
    splits = context.splits
    examples = (splits.search or splits.train or splits.held_out)[:PROOF_SENTENCES]
    return [(example.source, example.pair) for example in examples]


def _make(
    context: Context,
    name: str,
    make: Callable[..., None],
    source: Path,
    card: dict[str, Any],
    sentences: Sequence[tuple[str, str]],
    more: Sequence[Any],
    gpus: float = 0.0,
) -> None:
    import ray

    if context.rundir.complete(f"models/{name}"):
        there = read_card(context.rundir.local(f"models/{name}")) or {}
        if {key: there.get(key) for key in card} == card:
            return
    prompt = context.prompt
    with context.reporter.task(f"make {name}") as task, context.rundir.building(f"models/{name}") as target:
        work = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_with_all_cores).remote(
            make, source, target, card, prompt, sentences, *more
        )
        while not ray.wait([work], timeout=2)[0]:
            task.beat()
        with cluster.own_errors():
            ray.get(work)


def _with_all_cores(make: Callable[..., None], *given: Any) -> None:
    """Calls `make`, of which one runs at a time: Ray alone would give its torch one thread."""
    import torch

    torch.set_num_threads(cluster.cores())
    make(*given)


def cut_and_prove(
    source: Path,
    target: Path,
    card: dict[str, Any],
    prompt: Prompt,
    sentences: Sequence[tuple[str, str]],
    removed: Sequence[int] | None = None,
) -> None:
    """Saves `source` without its layers `removed` (default: those of the card) in `target`, loads it again, and
    compares it with the view it is of.

    Raises:
        UserError: the two do not give the same tokens for `sentences`.
    """
    save_and_prove(load_model(source, stored_dtype(source)), source, target, card, prompt, sentences, removed)


def save_and_prove(
    model: Any,
    source: Path,
    target: Path,
    card: dict[str, Any],
    prompt: Prompt,
    sentences: Sequence[tuple[str, str]],
    removed: Sequence[int] | None = None,
) -> None:
    """Saves `model`, which came from `source`, as `cut_and_prove` does."""
    from raylp.generate.transformers_view import TransformersGenerator

    dtype, tokenizer = stored_dtype(source), load_tokenizer(source)
    removed = card["removed"] if removed is None else removed
    save_checkpoint(model, source, target, card, removed)
    requests = prompt.requests(tokenizer, sentences)
    seen = TransformersGenerator(model, tokenizer, prompt.newline).generate(requests, removed)
    del model
    reloaded = TransformersGenerator(load_model(target, dtype), load_tokenizer(target), prompt.newline)
    for before, after in zip(seen, reloaded.generate(requests), strict=True):
        if before.tokens != after.tokens:
            raise UserError(
                f"the checkpoint {target.name} does not give the tokens of the view it was cut from ({before.text!r}, "
                f"{after.text!r}): please report this architecture",
                1,
            )
