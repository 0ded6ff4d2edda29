"""What raylp adds to a step of training: the same DeepSpeed steps by `raylp heal` and in a bare loop.

    python benchmarks/heal.py MODEL TRAIN --pair en-de --examples 3 --steps 16 --set method=lora --set row_tokens=2048

MODEL: a checkpoint, as in a recipe. TRAIN: pairs, as a recipe's train split. Both ways compute the same examples in the
same rows, in a process of their own, in turn, `--repeats` times; the bare loop has DeepSpeed and the loss and nothing
else: no Ray, no checkpoints, no record. Figures are medians over steps, the first two left out; the ratio is raylp's
step to the bare one. `between`: what raylp does between steps (checkpoints), as a share of its whole training.
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

WARM = 2


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        bare(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("--pair", default="en-de")
    parser.add_argument("--examples", type=int, default=0, help="shown in the prompt")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe's heal section")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        times: dict[str, list[float]] = {"raylp": [], "bare loop": []}
        between: list[float] = []
        padding = 0.0
        for turn in range(given.repeats):
            steps, padding, rest = by_raylp(given, Path(scratch) / f"run-{turn}", Path(scratch) / "job.pickle")
            times["raylp"] += steps
            between.append(rest)
            command = [sys.executable, __file__, "--bare", str(Path(scratch) / "job.pickle")]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times["bare loop"] += json.loads(told.strip().splitlines()[-1])
    print_table(times, padding, statistics.median(between))


def by_raylp(given: argparse.Namespace, run_dir: Path, job: Path) -> tuple[list[float], float, float]:
    """Seconds of each step but the first, the share of padding, and the share of time outside of steps."""
    from raylp import cluster
    from raylp.heal import plan
    from raylp.heal.stage import _examples, heal_model
    from raylp.pipeline import open_context
    from raylp.progress import Reporter
    from raylp.recipe import parse_recipe

    heal = {"data": "authentic", "checkpoint_every": 10_000}
    heal |= {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in given.set)}
    recipe = parse_recipe(
        {
            "model": given.model,
            "data": {given.pair: {"train": str(given.train.resolve())}},
            "prompt": {"examples": given.examples},
            "search": {"given": [1]},  # not done: the whole model is trained
            "heal": heal,
            "run_dir": str(run_dir),
        }
    )
    assert recipe.heal is not None
    size = recipe.heal.batch_size
    context = open_context(recipe, Reporter())
    del context.splits.train[given.examples + given.steps * size :]
    examples, dev = _examples(context, recipe.heal, context.baseline)
    assert not dev, "nothing but steps is timed"
    batches = [[examples[i] for i in step] for step in plan.steps(len(examples), size, 1, recipe.heal.seed)]
    threads = cluster.cores()
    job.write_bytes(pickle.dumps((str(context.baseline), recipe.heal.model_dump(), batches, threads)))
    began = time.monotonic()
    result = heal_model(context, context.baseline, "timed", "to be timed", [])
    assert result["steps"] == len(batches)
    records = [json.loads(line) for line in (run_dir / "heal" / "timed.jsonl").read_text().splitlines()]
    seconds = [record["seconds"] for record in records]
    return seconds[WARM:], result["padding"], 1 - sum(seconds) / (time.monotonic() - began)


def bare(job: Path) -> None:
    """Prints the seconds of each step but the first."""
    import deepspeed
    import torch

    from raylp.heal import plan
    from raylp.heal.config import Heal
    from raylp.heal.loop import deepspeed_options
    from raylp.heal.pack import loss_sum, why_not_packed
    from raylp.heal.trainable import make_trainable
    from raylp.models.load import load_model
    from raylp.models.stack import text_config

    path, section, batches, threads = pickle.loads(job.read_bytes())
    config = Heal.model_validate(section)
    gpu = torch.cuda.is_available()
    dtype = ("bfloat16" if gpu else "float32") if config.dtype == "auto" else config.dtype
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
    torch.set_num_threads(threads)
    if config.matmul == "bfloat16":
        torch.set_float32_matmul_precision("medium")
    inner = load_model(Path(path), dtype, "cuda" if gpu else "cpu")
    packed = why_not_packed(inner, [example for batch in batches for example in batch], text_config(inner)) is None
    torch.manual_seed(config.seed)
    model = make_trainable(inner, config).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(weights, lr=config.learning_rate),
        config=deepspeed_options(config, dtype),
    )
    found = []
    for batch in batches:
        began = time.monotonic()
        tokens = sum(len(example.target) for example in batch)
        (rows,) = plan.divide(range(len(batch)), batch, 1, config.row_tokens, packed)
        for place, row in enumerate(rows):
            engine.set_gradient_accumulation_boundary(place == len(rows) - 1)
            loss = loss_sum(engine, [batch[i] for i in row], text_config(inner), packed)
            engine.backward(loss / tokens)
        engine.step()
        loss.item()
        found.append(time.monotonic() - began)
    print(json.dumps(found[WARM:]))


def print_table(times: dict[str, list[float]], padding: float, between: float) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table("way", "steps", "s a step, median", "ratio")
    for name, value in medians.items():
        table.add_row(name, str(len(times[name])), f"{value:.3f}", f"{value / medians['bare loop']:.3f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"padding: {padding:.1%} of tokens; start, checkpoints and merging: {between:.0%} of this short run")


if __name__ == "__main__":
    main()
