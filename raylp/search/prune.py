"""Cut the layers of plan.json out of the baseline, and prove the checkpoint right before it counts as there."""

from collections.abc import Sequence
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


def pruned_name(num_layers: int) -> str:
    """Name under models/ of the model with `num_layers` left."""
    return f"pruned-{num_layers}"


def prune(context: Context) -> dict[str, Any]:
    """Writes models/pruned-N for every N layers that the plan says may stay."""
    plan = context.rundir.read_json("plan.json")
    depths = plan.get("depths") or [{"layers": plan["num_layers"] - len(plan["removed"]), "removed": plan["removed"]}]
    tests = [example for examples in context.splits.test.values() for example in examples]
    examples = (context.splits.search or context.splits.train or tests)[:PROOF_SENTENCES]
    sentences = [(example.source, example.pair) for example in examples]
    cluster.start(context.recipe.resources)
    made = [_prune_to(context, plan, depth["layers"], depth["removed"], sentences) for depth in depths]
    return {**made[-1], "models": made}


def _prune_to(
    context: Context, plan: dict[str, Any], layers: int, removed: list[int], sentences: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """One of the models, unless it is there."""
    import ray

    name = pruned_name(layers)
    source, prompt = context.baseline, context.prompt
    card = card_for(
        context.recipe.model.name, fingerprint(source), plan["stack"], removed, prompt.model_dump(mode="json")
    )
    if not (context.rundir.complete(f"models/{name}") and read_card(context.rundir.local(f"models/{name}")) == card):
        with context.reporter.task(f"prune to {name}") as task, context.rundir.building(f"models/{name}") as target:
            work = ray.remote(num_cpus=1, max_retries=0)(cut_and_prove).remote(source, target, card, prompt, sentences)
            while not ray.wait([work], timeout=2)[0]:
                task.beat()
            try:
                ray.get(work)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from error
    parameters, size = count_parameters(context.rundir.local(f"models/{name}"))
    return {"model": name, "parameters": parameters, "bytes": size}


def cut_and_prove(
    source: Path, target: Path, card: dict[str, Any], prompt: Prompt, sentences: Sequence[tuple[str, str]]
) -> None:
    """Saves `source` without `card["removed"]` in `target`, loads it again, and compares it with the view it is of.

    Raises:
        UserError: the two do not give the same tokens for `sentences`.
    """
    from raylp.generate.transformers_view import TransformersGenerator

    dtype = stored_dtype(source)
    model, tokenizer = load_model(source, dtype), load_tokenizer(source)
    save_checkpoint(model, source, target, card, card["removed"])
    requests = prompt.requests(tokenizer, sentences)
    seen = TransformersGenerator(model, tokenizer, prompt.newline).generate(requests, card["removed"])
    del model
    reloaded = TransformersGenerator(load_model(target, dtype), load_tokenizer(target), prompt.newline)
    for before, after in zip(seen, reloaded.generate(requests), strict=True):
        if before.tokens != after.tokens:
            raise UserError(
                f"the pruned checkpoint does not give the tokens of the view it was cut from ({before.text!r}, "
                f"{after.text!r}): please report this architecture",
                1,
            )
