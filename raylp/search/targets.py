"""When enough layers are gone: by number, parameters, bytes, estimated latency, or the loss of quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.models.checkpoint import Costs, layer_costs, stack_size
from raylp.search.config import Search as Section
from raylp.search.plan import num_evaluations, protected_layers


@dataclass(frozen=True)
class Target:
    """`depths`: numbers of layers wanted, deepest cut last. The rest is the most the pruned model may have.

    `latency` is a share of the unpruned model's time for a step; `max_loss` is in points of the objective. A target
    that names no depth goes on until what it names is reached; `max_loss` ends the search before it is exceeded.
    """

    num_layers: int
    protected: frozenset[int]
    depths: tuple[int, ...] = ()
    parameters: float | None = None
    bytes: float | None = None
    latency: float | None = None
    max_loss: float | None = None
    costs: Costs | None = None

    @property
    def free(self) -> list[int]:
        """The layers that may go."""
        return [layer for layer in range(self.num_layers) if layer not in self.protected]

    @property
    def most(self) -> int:
        """How many layers can go at most."""
        free = min(self.num_layers - len(self.protected), self.num_layers - 1)
        return self.num_layers - min(self.depths) if self.depths else free

    def room(self, removed: Sequence[int]) -> int:
        """How many layers may go at once without passing a depth that is wanted."""
        left = self.num_layers - len(removed)
        return min([self.most - len(removed), *(left - depth for depth in self.depths if depth < left)])

    def reached(self, removed: Sequence[int]) -> bool:
        """Whether a model without `removed` is small enough; never, where only the loss of quality is bounded."""
        if self.depths:
            return self.num_layers - len(removed) <= min(self.depths)
        tests = [
            self.size(kind, removed) <= limit
            for kind in ("parameters", "bytes", "latency")
            if (limit := getattr(self, kind)) is not None
        ]
        return bool(tests) and all(tests)

    def wanted(self, removed: Sequence[int]) -> bool:
        """Whether a model without `removed` is one that was asked for."""
        return self.num_layers - len(removed) in self.depths if self.depths else self.reached(removed)

    def size(self, kind: str, removed: Sequence[int]) -> float:
        """Parameters, bytes, or share of latency without `removed`."""
        assert self.costs is not None
        gone = set(removed)
        each, rest = {
            "parameters": (self.costs.parameters, self.costs.parameters_rest),
            "bytes": (self.costs.bytes, self.costs.bytes_rest),
            "latency": (self.costs.step, self.costs.step_rest),
        }[kind]
        left = rest + sum(value for layer, value in enumerate(each) if layer not in gone)
        return left / (rest + sum(each)) if kind == "latency" else left

    def _most_that_go(self, kind: str) -> tuple[int, ...]:
        """The free layers, but for the smallest where nothing else would stay."""
        free = tuple(self.free)
        if self.protected:
            return free
        return min((tuple(i for i in free if i != kept) for kept in free), key=lambda gone: self.size(kind, gone))

    def check(self) -> None:
        """
        Raises:
            UserError: it cannot be reached, or is reached before anything is removed.
        """
        free = self.num_layers - len(self.protected)
        if free < 1:
            raise UserError(f"search.protect names all {self.num_layers} layers, so none can go: protect fewer")
        for depth in self.depths:
            count = self.num_layers - depth
            if count < 1:
                raise UserError(
                    f"search.layers: {depth} of {self.num_layers} layers are to stay, so none would go; lower it"
                )
            if count > free:
                raise UserError(
                    f"{count} layers are to go, but the model has {self.num_layers} and {len(self.protected)} are "
                    f"protected, so at most {free} can: lower search.remove (or raise search.layers)"
                )
        for kind in ("parameters", "bytes", "latency"):
            limit = getattr(self, kind)
            if limit is None:
                continue
            least, whole = self.size(kind, self._most_that_go(kind)), self.size(kind, ())
            if limit >= whole:
                raise UserError(f"search.{kind}: {limit:g} is no less than the whole model's {whole:g}; lower it")
            if limit < least:
                raise UserError(
                    f"search.{kind}: {limit:g} cannot be met, without any layer that may go it is still {least:g}; "
                    f"raise it or protect fewer layers"
                )


def target_of(section: Section, path: Path) -> Target:
    """When the search of a recipe has removed enough, for the model in `path`.

    Raises:
        UserError: the model cannot be cut so far, or is small enough already.
    """
    num_layers = stack_size(path)
    depths = [num_layers - section.remove] if section.remove is not None else section.depths
    target = Target(
        num_layers,
        protected_layers(section.protect, num_layers),
        tuple(depths),
        section.parameters,
        section.bytes,
        section.latency,
        section.max_loss,
        layer_costs(path) if section.parameters or section.bytes or section.latency else None,
    )
    target.check()
    return target


def given_depths(section: Section, num_layers: int) -> list[dict[str, Any]]:
    """Of a list of layers that was given: for every depth, the layers that stay, and those removed, in order.

    Raises:
        UserError: the list does not fit the model, or is shorter than a depth needs.
    """
    from raylp.models.view import check_removed

    assert section.given is not None
    given = check_removed(section.given, num_layers)
    depths = section.depths or [num_layers - len(given)]
    for depth in depths:
        if not 0 < num_layers - depth <= len(given):
            raise UserError(
                f"search.layers: {depth} of {num_layers} layers are to stay, and search.given names {len(given)} that "
                f"may go: {num_layers - len(given)} to {num_layers - 1} can stay"
            )
    return [{"layers": depth, "removed": given[: num_layers - depth]} for depth in depths]


def most_evaluations(section: Section, target: Target) -> int:
    """Candidates there are in all rounds, the unpruned model among them; swaps come on top."""
    if section.strategy in ("oneshot", "sleb"):
        return 1 + len(target.depths)
    return 1 + section.beam * num_evaluations(target.num_layers, len(target.protected), target.most)
