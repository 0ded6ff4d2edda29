"""Cut the layers of plan.json out of the baseline, and prove the checkpoint right before it counts as there."""

from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.context import Context
from raylp.errors import UserError
from raylp.models.checkpoint import card_for, count_parameters, save_checkpoint
from raylp.models.load import load_model, load_tokenizer, stored_dtype
from raylp.models.source import fingerprint

PROOF_SENTENCES = 4


def pruned_name(num_layers: int) -> str:
    """Name under models/ of the model with `num_layers` left."""
    return f"pruned-{num_layers}"


def prune(context: Context) -> dict[str, Any]:
    """Writes models/pruned-N for the N layers that stay."""
    plan = context.rundir.read_json("plan.json")
    name = pruned_name(plan["num_layers"] - len(plan["removed"]))
    cluster.start(context.recipe.resources)
    import ray

    with context.reporter.task(f"prune to {name}") as task, context.rundir.building(f"models/{name}") as target:
        work = ray.remote(num_cpus=1, max_retries=0)(cut_and_prove).remote(context, context.baseline, target, plan)
        while not ray.wait([work], timeout=2)[0]:
            task.beat()
        try:
            ray.get(work)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from error
    parameters, size = count_parameters(context.rundir.local(f"models/{name}"))
    return {"model": name, "parameters": parameters, "bytes": size}


def cut_and_prove(context: Context, source: Path, target: Path, plan: dict[str, Any]) -> None:
    """Saves the cut model in `target`, loads it again, and compares it with the view it was cut from.

    Raises:
        UserError: the two do not give the same tokens.
    """
    from raylp.generate.transformers_view import TransformersGenerator

    dtype = stored_dtype(source)
    model = load_model(source, dtype)
    card = card_for(
        context.recipe.model.name,
        fingerprint(source),
        plan["stack"],
        plan["removed"],
        context.prompt.model_dump(mode="json"),
    )
    save_checkpoint(model, source, target, card, plan["removed"])
    tokenizer = load_tokenizer(source)
    examples = (context.splits.search or context.splits.train or sum(context.splits.test.values(), []))[
        :PROOF_SENTENCES
    ]
    requests = context.prompt.requests(tokenizer, [(example.source, example.pair) for example in examples])
    seen = TransformersGenerator(model, tokenizer, context.prompt.newline).generate(requests, plan["removed"])
    del model
    reloaded = TransformersGenerator(load_model(target, dtype), load_tokenizer(target), context.prompt.newline)
    for before, after in zip(seen, reloaded.generate(requests), strict=True):
        if before.tokens != after.tokens:
            raise UserError(
                f"the pruned checkpoint does not give the tokens of the view it was cut from ({before.text!r}, "
                f"{after.text!r}): please report this architecture",
                1,
            )
