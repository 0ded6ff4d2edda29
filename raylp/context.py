"""What every stage of a run is given, and the names of what stages leave behind."""

from dataclasses import dataclass, field
from pathlib import Path

from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt
from raylp.names import CUT_KINDS, kind_of, whole_of
from raylp.progress import Reporter
from raylp.recipe import Recipe
from raylp.rundir import RunDir


@dataclass(frozen=True)
class Splits:
    """`test` holds the test sets by name; the others are the corpora's splits joined. `mono`: sources alone."""

    search: list[Pair] = field(default_factory=list)
    train: list[Pair] = field(default_factory=list)
    dev: list[Pair] = field(default_factory=list)
    test: dict[str, list[Pair]] = field(default_factory=dict)
    mono: list[Pair] = field(default_factory=list)

    @property
    def held_out(self) -> list[Pair]:
        """What nothing may be learned from: search, dev and every test set."""
        return [*self.search, *self.dev, *(pair for own in self.test.values() for pair in own)]


@dataclass(frozen=True)
class Context:
    """`original`: the checkpoint the recipe names, as a local directory. `dtype`: of weights in memory.

    `start`: where a search begins that goes on from a healed model; `gone`: the layers which that lacks, in order.
    """

    recipe: Recipe
    rundir: RunDir
    splits: Splits
    prompt: Prompt
    original: Path
    dtype: str
    reporter: Reporter
    start: Path | None = None
    gone: tuple[int, ...] = ()

    @property
    def baseline(self) -> Path:
        """The model that is pruned: the original, or the adapted one when the recipe heals before pruning; in a later
        leg of a search the healed one that it starts from.
        """
        if self.start is not None:
            return self.start
        heal = self.recipe.heal
        if heal is not None and heal.when in ("before", "both"):
            return self.rundir.local("models/adapted")
        return self.original

    def models(self) -> dict[str, Path]:
        """The models of the run that are complete, by name, in the order of reports."""
        found: dict[str, Path] = {"baseline": self.baseline}
        if self.baseline != self.original:
            found["original"] = self.original
        names = self.rundir.names("models")
        for kind in (*CUT_KINDS, "baseline-healed"):
            for name in names:
                if kind_of(name) == kind and self.rundir.complete(f"models/{name}"):
                    found[name] = self.rundir.local(f"models/{name}")
        for whole in list(found):
            for name in names:
                if whole_of(name) == whole != name and self.rundir.complete(f"models/{name}"):
                    found[name] = self.rundir.local(f"models/{name}")
        return found
