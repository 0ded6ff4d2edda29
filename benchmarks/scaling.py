"""How busy many workers are: a recorded exhaustive search played again by workers that only wait.

    python benchmarks/scaling.py runs/exhaustive --workers 64 --times 4

RUN: an exhaustive search. Search, pool and Ray are the real ones; a unit takes the seconds that its line in the ledger
says, divided by --speed, and gives that line. `--times 4` gives every block four times, as if there were four times the
sentences. Efficiency: the seconds of all units, by workers x the time from start to end. `--batch-size` above the block
makes pieces of several units; they wait for the sum of their units' seconds, though a shared batch would take less.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from raylp import cluster
from raylp.generate.base import Request
from raylp.generate.pool import Pool, Worker
from raylp.ledger import Ledger, score_key
from raylp.metrics.objective import Objective
from raylp.progress import Reporter
from raylp.recipe import Resources
from raylp.rundir import RunDir
from raylp.search.blocks import Block
from raylp.search.evaluator import LedgerEvaluator
from raylp.search.plan import protected_layers
from raylp.search.strategies import Options, Search
from raylp.search.targets import Target
from raylp.search.worker import Work, pieces

# By set of layers and number of the block: its line.
Recorded = dict[tuple[frozenset[int], int], dict[str, Any]]


class Waiter(Worker):
    """Waits. It imports no torch, so that many of them start quickly."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait(self, seconds: float) -> None:
        """Does nothing for so long."""
        time.sleep(seconds)


class Player(LedgerEvaluator):
    """Scores from the recording; it knows no references, and so no noise."""

    def noise(self) -> None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--speed", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=1, help="sentences of a piece; a unit at least")
    parser.add_argument("--strategies", default="exhaustive,race")
    args = parser.parse_args()
    plan = RunDir(args.run).read_json("plan.json")
    recorded, blocks = read(RunDir(args.run))
    seconds = [line["seconds"] for (removed, _), line in recorded.items() if removed]
    print(
        f"{args.run}: {len(seconds)} units of {min(seconds):.1f} to {max(seconds):.1f} s, "
        f"{sum(seconds) / len(seconds):.1f} on average; {args.times} times over"
    )
    cluster.start(Resources(cpus=args.workers))
    with tempfile.TemporaryDirectory() as log, Reporter(quiet=True).task("wait") as task:
        pool = Pool(args.workers, True, Path(log), Waiter)
        try:
            ray.get([worker.pid.remote() for worker in pool.workers])  # all are up
            for strategy in args.strategies.split(","):
                work, wall, layers = play(strategy, args, plan, recorded, blocks, pool, task)
                share = work / (args.workers * wall)
                print(f"{strategy:12} {work:8.0f} s of work in {wall:6.1f} s by {args.workers}: {share:.1%}, {layers}")
        finally:
            pool.close()


def read(rundir: RunDir) -> tuple[Recorded, list[str]]:
    """The lines of all units, and the hashes of the blocks in order."""
    lines = [line for line in Ledger(rundir).lines.values() if "texts" in line]
    hashes = list(dict.fromkeys(line["block"] for line in lines if not line["removed"]))
    return {(frozenset(line["removed"]), hashes.index(line["block"])): line for line in lines}, hashes


def play(
    strategy: str,
    args: argparse.Namespace,
    plan: dict[str, Any],
    recorded: Recorded,
    hashes: list[str],
    pool: Pool,
    task: Any,
) -> tuple[float, float, list[int]]:
    """Seconds of work, seconds of wall time (both as recorded, not as hurried), and the layers removed."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(RunDir(folder))
        numbers = {f"{number}x{turn}": number for turn in range(args.times) for number in range(len(hashes))}
        sizes = [len(recorded[frozenset(), number]["texts"]) for number in numbers.values()]
        longest = {n: max(line["tokens"] for (_, m), line in recorded.items() if m == n) for n in numbers.values()}
        blocks = [
            Block("xx-yy", ("",) * size, ("",) * size, (Request((0,), -(-longest[number] // size)),) * size, (), name)
            for (name, number), size in zip(numbers.items(), sizes, strict=True)
        ]
        work = 0.0

        def line_of(unit: Any) -> dict[str, Any]:
            try:
                return recorded[frozenset(unit.removed), numbers[unit.block.hash]]
            except KeyError:
                raise SystemExit(
                    f"{strategy} took another way than {args.run}: {unit.removed} is not recorded"
                ) from None

        def submit(worker: Any, piece: Sequence[Any]) -> Any:
            return worker.wait.remote(sum(line_of(unit)["seconds"] for unit in piece) / args.speed)

        def compute(works: list[Work]) -> Iterator[tuple[Work, list[dict[str, Any]]]]:
            nonlocal work
            together = pieces(works, args.batch_size, args.workers, player.expected)
            for piece, _ in pool.run(together, submit, task, lambda piece: sum(map(player.expected, piece))):
                for unit in piece:
                    ((_, facts),) = unit.facts.items()
                    work += line_of(unit)["seconds"]
                    yield unit, [{**line_of(unit), **facts, "key": score_key(facts)}]

        objective = Objective.of({"chrF2++": 1.0}, ["xx-yy"])
        player = Player(Path(), "recorded", blocks, objective, ledger, compute, "transformers", "float32")
        player.at_once = args.workers * max(sizes)
        layers, depth = plan["num_layers"], len(plan["rounds"])
        target = Target(layers, protected_layers([0, -1], layers), (layers - depth,))
        started = time.perf_counter()
        search = Search(player, target, Options(strategy, floor="keep"))
        rounds = search.run()
        return work, (time.perf_counter() - started) * args.speed, list(rounds[-1].gone)


if __name__ == "__main__":
    main()
