"""The stage that mends the pruned models without training: a checkpoint for each method and depth."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.context import Context
from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt, beside_examples
from raylp.data.splits import text_hash
from raylp.data.tokens import examples_of
from raylp.errors import UserError
from raylp.generate.pool import plan_workers
from raylp.models.checkpoint import count_parameters, read_card
from raylp.models.load import load_model, load_tokenizer, stored_dtype
from raylp.names import REPAIRED
from raylp.repair.config import Repair
from raylp.search.prune import make_models, save_and_prove


def repair(context: Context) -> dict[str, Any]:
    """Writes models/compensated-N, merged-N and concatenated-N, as the recipe's methods say.

    Raises:
        UserError: a method does not know how the model is built.
    """
    section = context.recipe.repair
    if section is None:
        raise UserError("the recipe has no repair section: add 'repair: {methods: [compensate]}'")
    cluster.start(context.recipe.resources)
    gpus = _gpus(context)
    pairs = beside_examples(context.splits.train, context.prompt.examples, section.sentences)
    made = []
    for method in section.methods:
        facts: dict[str, Any] = {"method": method, "sentences": len(pairs), "sha256": text_hash(pairs)}
        if method == "merge":
            facts["merge_above"] = section.merge_above
        more = (section, pairs, "cuda" if gpus else "cpu")
        for model in make_models(context, REPAIRED[method], mend_and_prove, {"repair": facts}, *more, gpus=gpus):
            card = read_card(context.rundir.local(f"models/{model['model']}")) or {}
            made.append({**model, "found": card.get("found")})
            if method == "merge" and card.get("found"):
                context.reporter.line(f"{model['model']}: {tell_merges(card['found'])}")
    return {"models": made}


def _gpus(context: Context) -> float:
    """Of a GPU that the model fits on, the share it takes; 0 where the states are measured on the CPU."""
    gpus = plan_workers(context.recipe.resources, count_parameters(context.baseline)[1]).gpus
    return gpus if gpus <= 1 else 0.0


def tell_merges(tried: Sequence[dict[str, Any]]) -> str:
    """What became of the merges, in words: one that is not kept leaves its neighbour as plain removal does."""
    kept = sum(merge["kept"] for merge in tried)
    said = f"{kept} of {len(tried)} merges kept"
    if kept == len(tried):
        return said
    best = max((merge for merge in tried if not merge["kept"]), key=lambda merge: merge["merged"])
    return (
        f"{said}; the best of the others, of {', '.join(map(str, best['layers']))} into {best['into']}, left the last "
        f"states at cosine {best['merged']:.3f} to the whole model's, plain removal {best['plain']:.3f}"
    )


def mend_and_prove(
    source: Path,
    target: Path,
    card: dict[str, Any],
    prompt: Prompt,
    sentences: Sequence[tuple[str, str]],
    section: Repair,
    pairs: Sequence[Pair],
    device: str = "cpu",
) -> None:
    """Mends `source` by `card["repair"]["method"]` with states on `pairs`, then as `raylp.search.prune.cut_and_prove`.

    What the method found is added to the card. `device`: where it is mended; it is proved on the CPU.
    """
    from raylp.search.forced import ForcedScorer

    model, tokenizer = load_model(source, stored_dtype(source), device), load_tokenizer(source)
    scorer = ForcedScorer(model, examples_of(pairs, prompt, tokenizer))
    found = mend(scorer, card["removed"], card["repair"]["method"], section.merge_above)
    del scorer
    save_and_prove(model.to("cpu"), source, target, {**card, "found": found}, prompt, sentences)


def mend(scorer: Any, removed: Sequence[int], method: str, merge_above: float | None = None) -> Any:
    """Changes the layers of `scorer.model` that stay; what the method found, fit for JSON."""
    if method == "compensate":
        from raylp.repair.compensate import compensate

        return {str(layer): round(alpha, 4) for layer, alpha in compensate(scorer, removed).items()}
    if method == "merge":
        from raylp.repair.merge import merge

        return [asdict(tried) for tried in merge(scorer, removed, merge_above)]
    from raylp.repair.concatenate import concatenate

    return [asdict(joined) for joined in concatenate(scorer, removed)]
