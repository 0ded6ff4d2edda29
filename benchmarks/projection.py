"""What the searches of a trace would take on a model of another size: measured times of a step x recorded steps.

    python benchmarks/projection.py --shape 8b --trace benchmarks/results/search-trace.json

The trace, written by `benchmarks/search.py --trace FILE`, says for every call of generation how many rows it had and
how many tokens each of them said. Here a randomly initialised model of the shape is timed: the first step (prompts) and
a later one at several numbers of rows, by raylp's views sharing a batch and by transformers' own `generate`, and a
reload of the checkpoint. The figures are projected, not measured: nothing is translated. Runs without ray.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, random_model

from raylp.generate.base import Asked, Request
from raylp.generate.transformers_view import TransformersGenerator
from raylp.models.load import load_model
from raylp.models.stack import find_stack

SHORT, LONG = 4, 20  # tokens of the two generations whose difference is a step's time
ROWS = (1, 8, 32, 128, 256)
VIEWS = 16


class Silent:
    """Instead of a tokenizer: no token ends a row, and no token says anything."""

    eos_token_id = None

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


class Endless:
    """Instead of a stop rule: random models repeat themselves, and are to go on."""

    def finished(self, _: Sequence[int]) -> None:
        return None


class Times:
    """Seconds of the first step and of a later one, by the number of rows."""

    def __init__(self, seconds: Callable[[int, int], float], most: int) -> None:
        self.rows = [rows for rows in ROWS if rows < most] + [most]
        self.first, self.step = [], []
        for rows in self.rows:
            short, long = (min(seconds(rows, tokens) for _ in range(2)) for tokens in (SHORT, LONG))
            self.step.append(max(0.0, long - short) / (LONG - SHORT))
            self.first.append(max(0.0, short - (SHORT - 1) * self.step[-1]))

    def of(self, values: list[float], rows: float) -> float:
        """Between the numbers of rows that were timed, a straight line."""
        return float(np.interp(rows, self.rows, values))

    def shrinking(self, lengths: Sequence[int]) -> float:
        """A call whose rows leave the batch when they end."""
        later = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
        return self.of(self.first, len(lengths)) + sum(self.of(self.step, rows) for rows in later)

    def whole(self, rows: int, steps: int) -> float:
        """A call whose rows all go on to the last one's end."""
        return self.of(self.first, rows) + (steps - 1) * self.of(self.step, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True, type=Path)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    args = parser.parse_args(arguments)
    trace = json.loads(args.trace.read_text())
    model = random_model(args.shape, args.dtype, args.device)
    most, prompt = trace["batch_size"], trace["prompt_tokens"]
    reload = reload_seconds(model, args.dtype, args.device)
    ours = Times(lambda rows, tokens: view_seconds(model, rows, tokens, prompt, trace["shared_tokens"]), most)
    theirs = Times(lambda rows, tokens: generate_seconds(model, rows, tokens, prompt), most)
    loop = trace["loop"]
    plain = sum(theirs.whole(rows, steps) for rows, steps in loop["calls"]) + loop["candidates"] * reload
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{args.shape}, {args.dtype}, {name}; trace: {trace['of']}")
    print(f"reload {reload:.1f} s; milliseconds of the first and of a later step, by rows:")
    for label, times in (("views sharing a batch", ours), ("transformers' generate", theirs)):
        cells = zip(times.rows, times.first, times.step, strict=True)
        print(f"  {label:24}", "  ".join(f"{r}: {1e3 * a:.0f}, {1e3 * b:.1f}" for r, a, b in cells))
    print(f"\n{'PROJECTED':26}{'seconds':>10}{'faster':>10}")
    print(f"{'published loop, plainly':26}{plain:10,.0f}{1:9.1f}x")
    for strategy, calls in trace["strategies"].items():
        seconds = sum(ours.shrinking(lengths) for lengths in calls)
        print(f"{strategy:26}{seconds:10,.0f}{plain / seconds:9.1f}x")


def reload_seconds(model: Any, dtype: str, device: str) -> float:
    """Loading the checkpoint once more; it was just written, so that the disk hardly counts."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return timed(lambda: load_model(Path(folder), dtype, device), device)


def view_seconds(model: Any, rows: int, tokens: int, prompt: int, shared: int) -> float:
    """raylp's generation of `tokens` for `rows` prompts, which belong to as many as 16 views of the model."""
    generator = TransformersGenerator(model, Silent(), newline=False, batch_size=rows, step_tokens=1)
    generator.rule = Endless()  # type: ignore[assignment]
    views = min(VIEWS, rows, find_stack(model).num_layers - 2)
    asked: list[Asked] = [
        ([Request(words(row, prompt, shared), tokens) for row in range(view, rows, views)], (1 + view,), None)
        for view in range(views)
    ]
    assert generator._by_row
    return timed(lambda: generator.generate_together(asked), model.device.type)


def generate_seconds(model: Any, rows: int, tokens: int, prompt: int) -> float:
    """transformers' own generation of `tokens` for `rows` prompts."""
    inputs = torch.tensor([words(row, prompt, 0) for row in range(rows)], device=model.device)
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(inputs)
    with torch.inference_mode():
        return timed(lambda: model.generate(inputs, attention_mask=mask, **options), model.device.type)


def words(row: int, length: int, shared: int) -> tuple[int, ...]:
    """Random tokens of which the first `shared` are those of all rows."""
    own = np.random.default_rng(row + 1).integers(3, 1000, length - shared)
    return (*np.random.default_rng(0).integers(3, 1000, shared).tolist(), *own.tolist())


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds, what is left to the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
