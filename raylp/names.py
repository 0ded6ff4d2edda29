"""What the models of a run are called: a kind, and how many layers are left."""

# By method of the recipe's `repair` section, the kind of model it makes.
REPAIRED = {"compensate": "compensated", "merge": "merged", "concatenate": "concatenated"}
# Models with layers removed, in the order of reports; `pruned-15` has 15 left.
CUT_KINDS = ("pruned", *REPAIRED.values(), "healed")


def kind_of(name: str) -> str:
    """`pruned-15` is `pruned`; `baseline-healed` is itself."""
    stem, _, tail = name.rpartition("-")
    return stem if stem and tail.isdigit() else name
