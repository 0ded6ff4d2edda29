"""What a race would have chosen, and at what cost, had the sentences come in another order.

From an exhaustive search's ledger, which holds every sentence's row of every candidate in every round, `race` is run
again and again on shuffled sentences, each round from the exhaustive search's own state. Nothing is generated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from raylp.errors import UserError
from raylp.ledger import TRANSLATION, Ledger
from raylp.metrics.intervals import paired_difference
from raylp.metrics.ngram import Statistics
from raylp.metrics.objective import FORCED, Objective, usual_name
from raylp.rundir import RunDir
from raylp.search.plan import Removed
from raylp.search.race import race


@dataclass(frozen=True)
class Recording:
    """`rounds`: the candidates of each; `rows`: by set of layers, of the sentences of each pair, joined in order."""

    objective: Objective
    rounds: list[list[Removed]]
    rows: dict[frozenset[int], Statistics]
    pairs: list[str]

    @property
    def sentences(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class RoundReplay:
    """Shares of the replays of one round. `best`: the exhaustive choice; `tie`: chose another, the interval of whose
    paired difference from the best holds zero; `worse`: chose one that is worse for sure; `sentences`: generated, mean.
    """

    best: int
    same: float
    tie: float
    worse: float
    loss: float
    sentences: float
    exhaustive: int
    chosen: dict[int, int]


def read_recording(rundir: RunDir) -> Recording:
    """The exhaustive rounds of a run.

    Raises:
        UserError: there are none, or the ledger lacks some of their lines.
    """
    if not rundir.exists("plan.json"):
        raise UserError(f"{rundir.url} has no plan.json: run raylp search with search.strategy: exhaustive first")
    plan = rundir.read_json("plan.json")
    if len(plan.get("legs", ())) > 1:
        raise UserError(f"{rundir.url} was healed in between: replay is for a search of one model")
    rounds = [
        [tuple(candidate["removed"]) for candidate in r["candidates"]]
        for r in plan["rounds"]
        if r.get("strategy", "exhaustive") == "exhaustive" and r["candidates"] and "move" not in r
    ]
    if not rounds:
        raise UserError(f"{rundir.url} holds no exhaustive rounds: search with --set search.strategy=exhaustive")
    recipe = yaml.safe_load(rundir.read_text("recipe.yaml"))
    cache = RunDir(recipe["cache"]) if recipe.get("cache") else None
    lines = list(Ledger(rundir, cache).lines.values())
    weights = {usual_name(name): weight for name, weight in (plan.get("objective") or {"chrF2++": 1.0}).items()}
    if forced := [name for name in weights if name in FORCED]:
        raise UserError(f"{rundir.url} was searched by {forced[0]}: replay is for metrics of translations")
    here = [line for line in lines if line["model"] == plan["fingerprint"] and _plain(line["decoding"])]
    pair_of = {line["block"]: line["pair"] for line in here if "pair" in line}
    default = next(iter(pair_of.values()), "xx-xx")
    objective = Objective.of(weights, [pair_of.get(line["block"], default) for line in here])
    table = {(frozenset(x["removed"]), x["block"], x["metric"]): x["statistics"] for x in here}
    scored = [line["block"] for line in here if not line["removed"] and line["metric"] != TRANSLATION]  # not test text
    blocks = list(dict.fromkeys(scored))
    rows, pairs = {}, [pair_of.get(block, default) for block in blocks for _ in _any(table, block)]
    for removed in {frozenset(candidate) for candidates in rounds for candidate in candidates}:
        parts = []
        for block in blocks:
            pair = pair_of.get(block, default)
            try:
                found = {name: table[removed, block, objective.filed(name, pair)] for name in weights}
            except KeyError:
                raise UserError(
                    f"{rundir.url}: the ledger has no {objective.name} of block {block} without {sorted(removed)}; run "
                    f"the search again, it adds what is missing"
                ) from None
            parts.append(objective.rows(found, pair))
        rows[removed] = np.concatenate(parts)
    return Recording(objective, rounds, rows, pairs)


def _plain(decoding: str) -> bool:
    """Whether a line is of the model as it is: no probabilities, no short heal."""
    return decoding != "forced" and "|healed:" not in decoding


def _any(table: dict[Any, Any], block: str) -> list[Any]:
    return next(statistics for (_, other, _), statistics in table.items() if other == block)


def replay(
    recording: Recording,
    times: int = 1000,
    risk: float = 0.05,
    block: int = 16,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda _: None,
) -> list[RoundReplay]:
    """Each round `times` times over, on sentences shuffled into blocks of `block`."""
    random = np.random.default_rng(seed)
    score = recording.objective.score
    found = []
    for candidates in recording.rounds:
        rows = [recording.rows[frozenset(candidate)] for candidate in candidates]
        totals = [score(each.sum(0)) for each in rows]
        best = min(range(len(rows)), key=lambda c: (-totals[c], candidates[c][-1]))
        tied_with = ties(recording.objective, rows, best)
        chosen: dict[int, int] = {}
        sentences = 0
        for _ in range(times):
            order = _cut(recording.pairs, block, random)
            result = race(
                len(rows),
                [len(part) for part in order],
                lambda _: None,
                lambda c, number, order=order, rows=rows: rows[c][order[number]],  # type: ignore[misc]
                score,
                risk,
                turn=len(recording.objective.pairs),
            )
            chosen[result.winners[0]] = chosen.get(result.winners[0], 0) + 1
            sentences += sum(standing.sentences for standing in result.standings)
            advance(1)
        same = chosen.get(best, 0) / times
        tied = sum(count for c, count in chosen.items() if c != best and c in tied_with) / times
        found.append(
            RoundReplay(
                candidates[best][-1],
                same,
                tied,
                1 - same - tied,
                sum((totals[best] - totals[c]) * count for c, count in chosen.items()) / times,
                sentences / times,
                len(rows) * recording.sentences,
                _by_layer(candidates, chosen),
            )
        )
    return found


def _by_layer(candidates: Sequence[Removed], chosen: dict[int, int]) -> dict[int, int]:
    """How often each layer was the one taken, most often first; a beam's candidates may end in the same one."""
    counts: dict[int, int] = {}
    for c, count in chosen.items():
        counts[candidates[c][-1]] = counts.get(candidates[c][-1], 0) + count
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def ties(objective: Objective, rows: Sequence[Statistics], best: int) -> set[int]:
    """Candidates whose paired difference from the best one has a 95% interval that holds zero."""
    found = set()
    for c, own in enumerate(rows):
        difference = paired_difference(objective, own, rows[best])
        if difference.low <= 0 <= difference.high:
            found.add(c)
    return found


def _cut(pairs: Sequence[str], block: int, random: Any) -> list[Any]:
    """Blocks of sentence numbers, shuffled within each pair; those of several pairs take turns."""
    by_pair = []
    for pair in dict.fromkeys(pairs):
        numbers = random.permutation([i for i, own in enumerate(pairs) if own == pair])
        by_pair.append([numbers[start : start + block] for start in range(0, len(numbers), block)])
    most = max(len(parts) for parts in by_pair)
    return [parts[turn] for turn in range(most) for parts in by_pair if turn < len(parts)]


def render(recording: Recording, rounds: Sequence[RoundReplay], times: int, risk: float) -> Any:
    """A table for the terminal."""
    from rich.table import Table

    title = f"race on {recording.sentences} sentences, {times} replays, stated risk {risk:.0%}"
    table = Table(title=title, title_justify="left", show_footer=True)
    sentences = sum(r.sentences for r in rounds)
    whole = sum(r.exhaustive for r in rounds)
    right = 1 - sum(r.worse for r in rounds) / len(rounds)
    columns = (
        ("round", "all"),
        ("exhaustive takes", ""),
        ("same", f"{sum(r.same for r in rounds) / len(rounds):.1%}"),
        ("or a tie", f"{right:.1%}"),
        ("mean loss", f"{sum(r.loss for r in rounds) / len(rounds):.2f}"),
        ("sentences", f"{sentences:,.0f}"),
        ("exhaustive", f"{whole:,}"),
        ("fewer", f"{whole / sentences:.1f} x"),
        ("chosen", ""),
    )
    for name, footer in columns:
        table.add_column(name, footer, justify="left" if name == "chosen" else "right")
    for number, r in enumerate(rounds, start=1):
        chosen = ", ".join(f"{layer}: {count / times:.0%}" for layer, count in list(r.chosen.items())[:4])
        table.add_row(
            str(number),
            str(r.best),
            f"{r.same:.1%}",
            f"{r.same + r.tie:.1%}",
            f"{r.loss:.2f}",
            f"{r.sentences:,.0f}",
            f"{r.exhaustive:,}",
            f"{r.exhaustive / r.sentences:.1f} x",
            chosen,
        )
    return table
