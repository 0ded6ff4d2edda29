"""Teacher-forced scores of a model without some of its layers, and of every next layer by an exact prefix sweep.

The target is given, and one forward pass tells how likely every token of it was: cheaper than translating. To try
every layer, the states before layer i are computed once and shared: the candidate without i runs the layers after i
only, then the states advance by layer i. Every layer sees the same numbers in the same shapes as in a pass of its own,
so in one process the rows are those of the plain way, bit for bit.

Pure torch and transformers: nothing here knows of workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raylp.data.tokens import Example
from raylp.errors import UserError
from raylp.generate.base import common_prefix
from raylp.models.stack import find_stack, text_config
from raylp.models.view import check_removed, resumed, without_layers

Rows = NDArray[np.float64]
Objective = Literal["likelihood", "agreement"]

BATCH_SIZE = 16
KEEP_BYTES = 1 << 30
LOGITS_BYTES = 1 << 28
LEAST_PREFIX = 8


@dataclass(frozen=True)
class Cost:
    """`layers`: forwards of one layer over all examples (units); `projections`: of all target positions to words."""

    layers: int = 0
    projections: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.layers + other.layers, self.projections + other.projections)


def plain_cost(num_alive: int, num_candidates: int, objective: Objective = "likelihood") -> Cost:
    """Every candidate on its own, in a model of `num_alive` layers."""
    return Cost(num_candidates * (num_alive - 1), num_candidates * _projections(objective))


def sweep_cost(num_alive: int, places: Sequence[int], known: int = 0, objective: Objective = "likelihood") -> Cost:
    """The same by the prefix sweep.

    `places`: of the candidates among the `num_alive` layers, from 0; `known`: the layers whose outputs are kept from an
    earlier sweep. 32 layers, all but the first and the last: 495 units against 930.
    """
    advance = max(0, max(places, default=0) - known)
    suffixes = sum(num_alive - 1 - place for place in places)
    return Cost(advance + suffixes, len(places) * _projections(objective))


def _projections(objective: Objective) -> int:
    return 2 if objective == "agreement" else 1  # the unpruned model's words are projected beside the candidate's


@dataclass(frozen=True)
class Batch:
    """Some examples, padded on the right, where a causal model needs no mask and counts positions from 0.

    `numbers`: of the examples; `tokens`: (rows, length); `ends`: the place of each row's last token (rows,); `rows`,
    `places`: where the tokens `targets` are predicted, each (targets,); `owners`: the example of each (targets,).
    """

    numbers: list[int]
    tokens: Any
    ends: Any
    rows: Any
    places: Any
    targets: Any
    owners: Any


def make_batches(examples: Sequence[Example], batch_size: int, device: Any, start: int = 0) -> list[Batch]:
    """`batch_size` examples of like length at a time, without their first `start` tokens; always the same batches."""
    import torch

    def tensor(values: Any) -> Any:
        return torch.tensor(values, device=device)

    order = sorted(range(len(examples)), key=lambda i: (examples[i].length, i))
    batches = []
    for done in range(0, len(order), batch_size):
        numbers = order[done : done + batch_size]
        longest = max(examples[i].length for i in numbers) - start
        tokens, places = [], []
        for row, i in enumerate(numbers):
            example = examples[i]
            read = [*example.prompt, *example.target[:-1]][start:]
            # Nothing looks at the padding; a word of the row itself is a word of every vocabulary, and never an image.
            tokens.append(read + read[-1:] * (longest - len(read)))
            first = len(example.prompt) - 1 - start
            places += [(row, first + step, token, i) for step, token in enumerate(example.target)]
        rows, spots, targets, owners = zip(*places, strict=True)
        ends = [examples[i].length - 1 - start for i in numbers]
        batches.append(
            Batch(numbers, tensor(tokens), tensor(ends), *(tensor(list(v)) for v in (rows, spots, targets, owners)))
        )
    return batches


class ForcedScorer:
    """Scores one resident model on a fixed set of examples.

    `model`: a transformers causal model in evaluation mode; it is as before between calls. `examples`: prompts and
    targets. `batch_size`: rows at a time. Scores depend on it in their last bits, as on the dtype.

    Memory: one state of the set (tokens x hidden size) during a sweep; up to `keep_bytes` of further states, so that
    the next sweep starts from them; and about three times `logits_bytes` for word probabilities, whatever the
    vocabulary.

    What all prompts begin with (the examples shown in them) is one row of its own in every pass, and its keys and
    values serve all batches. Without `share_prefix`, or where a sliding window is shorter, every row computes it again.

    `batches` are the examples whole, `spent` counts what has been computed.

    Raises:
        UserError: no examples, or an empty prompt or target.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        batch_size: int = BATCH_SIZE,
        keep_bytes: int = KEEP_BYTES,
        logits_bytes: int = LOGITS_BYTES,
        share_prefix: bool = True,
    ) -> None:
        if not examples:
            raise UserError("no sentences to score: give the search some data")
        for number, example in enumerate(examples):
            if not example.prompt or not example.target:
                raise UserError(f"sentence {number}: its prompt or its target has no tokens; remove it")
        self.model = model
        stack = find_stack(model)
        self.num_layers = stack.num_layers
        self.layers = list(model.get_submodule(stack.path))
        self.num_examples = len(examples)
        self.batches = make_batches(examples, batch_size, model.device)
        config = text_config(model)
        shared = _shared_length(examples, config) if share_prefix else 0
        self._prefix = self.batches[0].tokens[:1, :shared]
        self._rests = make_batches(examples, batch_size, model.device, shared)
        self.num_tokens = shared + sum(batch.tokens.numel() for batch in self._rests)
        self.num_targets = sum(len(example.target) for example in examples)
        self.chunk = max(1, logits_bytes // (4 * config.vocab_size))
        self.spent = Cost()
        self._tuples = False
        self._room = keep_bytes // (self.num_tokens * config.hidden_size * model.dtype.itemsize)
        # By the layers that were run: the states after them, of the prefix (None without one) and of every batch.
        self._states: dict[tuple[int, ...], list[Any]] = {}

    @cached_property
    def _unpruned(self) -> Any:
        """(targets, hidden size): what the whole model's last layer says where targets are predicted.

        Kept instead of its probabilities, which are as wide as the vocabulary.
        """
        return self._run((), range(self.num_layers))[0]

    def alive(self, removed: Sequence[int]) -> list[int]:
        """The layers left without `removed`, in order."""
        gone = set(check_removed(removed, self.num_layers))
        return [i for i in range(self.num_layers) if i not in gone]

    def score(self, removed: Sequence[int] = (), objective: Objective = "likelihood") -> Rows:
        """The model without `removed`, in one pass of its own.

        Returns:
            (examples, 2), additive. `likelihood`: the sum of log-probabilities (nats) of the target's tokens, and their
            number. `agreement`: the sum over the same positions of KL(unpruned model || this one), and their number.
        """
        final, _ = self._run((), self.alive(removed))
        return self._rows(final, objective)

    def sweep(
        self, removed: Sequence[int], layers: Sequence[int], objective: Objective = "likelihood"
    ) -> dict[int, Rows]:
        """For each of `layers`: what `score` gives without `removed` and that layer.

        A following sweep without the best layer (highest likelihood or closest agreement; of equals the lowest) runs no
        layer to advance, where `keep_bytes` allowed to keep the states on the way of that candidate; without another
        layer, none before that layer.

        Raises:
            UserError: a layer is not there, or already removed.
        """
        alive = self.alive(removed)
        for layer in layers:
            check_removed((*removed, layer), self.num_layers)
        self._states = {run: states for run, states in self._states.items() if run == tuple(alive[: len(run)])}
        sign = -1 if objective == "agreement" else 1
        rows: dict[int, Rows] = {}
        best = -np.inf
        leading: dict[tuple[int, ...], list[Any]] = {}
        for layer in sorted(layers):
            place = alive.index(layer)
            before, after = tuple(alive[:place]), alive[place + 1 :]
            self._reach(before, len(leading))
            keep = len(self._states) + len(leading) + len(after) - 1 <= self._room
            final, states = self._run(before, after, after[:-1] if keep else ())
            rows[layer] = self._rows(final, objective)
            value = sign * rows[layer][:, 0].sum()
            if value > best:
                best, leading = value, states
        self._states |= leading
        self._trim(())
        return {layer: rows[layer] for layer in layers}

    def _reach(self, run: tuple[int, ...], held: int) -> None:
        """Computes the states after the layers `run` from the nearest that are there; `held`: states kept elsewhere."""
        known = max((known for known in self._states if run[: len(known)] == known), key=len, default=())
        if known != run:
            rest = run[len(known) :]
            # Of several layers on the way, only the last is needed now.
            wanted = rest if len(self._states) + held + len(rest) <= self._room else rest[-1:]
            self._states |= self._run(known, rest, wanted, project=False)[1]
        self._trim(run, held)

    def _trim(self, needed: tuple[int, ...], held: int = 0) -> None:
        """Drops the oldest states that are too many, but never `needed`."""
        for run in [run for run in self._states if run != needed]:
            if len(self._states) + held <= self._room:
                return
            del self._states[run]

    def _run(
        self, start: tuple[int, ...], layers: Sequence[int], keep: Sequence[int] = (), project: bool = True
    ) -> tuple[Any, dict[tuple[int, ...], list[Any]]]:
        """`layers`, in rising order, on the states after the layers `start`.

        Returns:
            (targets, hidden size), the last layer's output where targets are predicted, or None without `project`; and
            the states after each layer in `keep`.
        """
        import torch

        self.spent += Cost(len(layers))
        runs = {layer: (*start, *layers[: place + 1]) for place, layer in enumerate(layers) if layer in keep}
        given = self._states[start] if start else [None] * (1 + len(self._rests))
        states: dict[tuple[int, ...], list[Any]] = {run: [] for run in runs.values()}
        finals = []
        with torch.no_grad(), self._view(start, layers) as entry:
            wanted = [*runs, *layers[-1:]]
            prefix = self._cache(None, 1) if self._prefix.numel() and layers else None
            first = self._forward(self._prefix, prefix, entry, given[0], wanted) if prefix is not None else {}
            for layer, run in runs.items():
                states[run].append(first.get(layer))
            for batch, before in zip(self._rests, given[1:], strict=True):
                cache = self._cache(prefix, len(batch.tokens)) if prefix is not None else None
                outputs = self._forward(batch.tokens, cache, entry, before, wanted) if layers else {}
                for layer, run in runs.items():
                    states[run].append(outputs[layer])
                if project:
                    finals.append((outputs[layers[-1]] if layers else before)[batch.rows, batch.places])
        return (torch.cat(finals) if project else None), states

    def _forward(self, tokens: Any, cache: Any, entry: Any, before: Any, layers: Sequence[int]) -> dict[int, Any]:
        """The outputs of `layers` in one pass of the active view, from the states `before` if there is an `entry`."""
        outputs: dict[int, Any] = {}

        def see(layer: int, _: Any, states: Any) -> None:
            outputs[layer] = states

        if entry is not None:
            entry.output = self._as_output(before)
        with self.watching(layers, see):
            self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        return outputs

    def _cache(self, prefix: Any, rows: int) -> Any:
        """A cache for the active view: empty, or with the keys and values of `prefix` in every row."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for place, layer in enumerate(() if prefix is None else prefix.layers):
            if layer.is_initialized:
                cache.update(*(states.expand(rows, -1, -1, -1) for states in (layer.keys, layer.values)), place)
            else:
                # The entry has no keys, but positions and masks are counted from the first layer of the cache.
                none = torch.zeros((rows, 1, self._prefix.shape[1], 1), device=self.model.device)
                cache.update(none, none, place)
        return cache

    @contextmanager
    def _view(self, start: tuple[int, ...], layers: Sequence[int]) -> Iterator[Any]:
        """The model running `layers`: from the tokens, or behind an entry for the layers `start`."""
        if not layers:
            yield None
        elif start:
            with resumed(self.model, layers) as entry:
                yield entry
        else:
            with without_layers(self.model, [i for i in range(self.num_layers) if i not in set(layers)]):
                yield None

    @contextmanager
    def watching(self, layers: Iterable[int], see: Callable[[int, Any, Any], Any]) -> Iterator[None]:
        """Calls `see(layer, input states, output states)` whenever one of `layers` has run."""

        def hook(layer: int, _: Any, args: Any, kwargs: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)
            see(layer, args[0] if args else kwargs["hidden_states"], output[0] if self._tuples else output)

        handles = [
            self.layers[i].register_forward_hook(partial(hook, i), with_kwargs=True) for i in dict.fromkeys(layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _as_output(self, states: Any) -> Any:
        """States in the form this family's layers return them; a pass from the tokens has shown it."""
        return (states, None) if self._tuples else states

    def chunks(self) -> Iterator[slice]:
        """Target positions to project at a time."""
        for start in range(0, self.num_targets, self.chunk):
            yield slice(start, start + self.chunk)

    @contextmanager
    def projecting(self) -> Iterator[Callable[[Any], Any]]:
        """A function from the last layer's outputs (positions, hidden size) to float32 logits (positions, vocabulary).

        Last norm, output layer, caps and scales are the model's own: it runs without any layer, on one row of one
        token for each position.
        """
        import torch

        with resumed(self.model, ()) as entry:

            def project(final: Any) -> Any:
                entry.output = self._as_output(final[:, None])
                tokens = torch.zeros((len(final), 1), dtype=torch.long, device=final.device)
                logits = self.model(input_ids=tokens, use_cache=False).logits[:, 0]
                return logits.to(torch.promote_types(logits.dtype, torch.float32))

            yield project

    @cached_property
    def targets(self) -> Any:
        """(targets,) token ids, batch after batch."""
        import torch

        return torch.cat([batch.targets for batch in self.batches])

    @cached_property
    def owners(self) -> Any:
        """(targets,) the example of each target."""
        import torch

        return torch.cat([batch.owners for batch in self.batches]).cpu()

    def _rows(self, final: Any, objective: Objective) -> Rows:
        import torch

        unpruned = self._unpruned if objective == "agreement" else None
        values = []
        with torch.no_grad(), self.projecting() as logits:
            for part in self.chunks():
                if unpruned is None:
                    values.append(log_probabilities(logits(final[part]), self.targets[part]))
                else:
                    values.append(divergence(logits(unpruned[part]), logits(final[part])))
        self.spent += Cost(projections=_projections(objective))
        both = torch.stack([torch.cat(values).double().cpu(), torch.ones(self.num_targets, dtype=torch.double)], 1)
        rows = torch.zeros((self.num_examples, 2), dtype=torch.double).index_add_(0, self.owners, both)
        return rows.numpy()


def _shared_length(examples: Sequence[Example], config: Any) -> int:
    """How many tokens all prompts begin with that can be a row of their own, 0 for too few to be worth it.

    A sliding cache drops what is outside its window, and positions beyond the original length may change the rotary
    tables of all: then nothing is shared.
    """
    length = common_prefix([example.prompt for example in examples]) if len(examples) > 1 else 0
    window = getattr(config, "sliding_window", None)
    original = getattr(config, "original_max_position_embeddings", None)
    outside = (window is not None and length >= window) or (
        original is not None and max(example.length for example in examples) > original
    )
    return 0 if outside or length < LEAST_PREFIX else length


def log_probabilities(logits: Any, targets: Any) -> Any:
    """(positions,): of the tokens `targets`, in nats."""
    import torch

    # logsumexp takes up to six times as long on a CPU where a broken model's logits are far apart.
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def divergence(first: Any, second: Any) -> Any:
    """(positions,): KL(first || second) of the distributions of two (positions, vocabulary) logits, in nats."""
    expected = first.log_softmax(1)
    return (expected.exp() * (expected - second.log_softmax(1))).sum(1)
