"""What the models of a run are called: a kind, and how many layers are left."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from raylp.errors import UserError

# By method of the recipe's `repair` section, the kind of model it makes.
REPAIRED = {"compensate": "compensated", "merge": "merged", "concatenate": "concatenated"}
# How weights may be quantised (`raylp.quantize.schemes`); `healed-14-gptq` is healed-14 in 4 bits.
SCHEMES = (
    *("w8a8", "gptq", "awq", "fp8", "int8", "nf4"),
    *("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8"),
)
# Models with layers removed, in the order of reports; `pruned-15` has 15 left.
CUT_KINDS = ("pruned", *REPAIRED.values(), "healed")


def kind_of(name: str) -> str:
    """`pruned-15` is `pruned`; `baseline-healed` is itself."""
    stem, _, tail = name.rpartition("-")
    return stem if stem and tail.isdigit() else name


def whole_of(name: str) -> str:
    """The model that `name` is a quantised form of, or `name` itself."""
    stem, _, tail = name.rpartition("-")
    return stem if stem and tail in SCHEMES else name


def choose_models(wanted: Sequence[str] | None, there: Mapping[str, Path], key: str) -> dict[str, Path]:
    """The models called `wanted`, in that order; all for None. `healed`, `pruned` and the like mean the run's one.

    Raises:
        UserError: the run has no such model; `key` is the place in the recipe.
    """
    if wanted is None:
        return dict(there)
    chosen: dict[str, Path] = {}
    for name in wanted:
        # The latest of a kind is the one with the fewest layers.
        kind = sorted((n for n in there if n.startswith(f"{name}-")), key=lambda n: (len(n), n))
        found = name if name in there else kind[0] if name in CUT_KINDS and kind else None
        if found is None:
            raise UserError(f"{key}: the run has no model {name!r}; it has {', '.join(there)}")
        chosen[found] = there[found]
    return chosen
