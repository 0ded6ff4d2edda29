"""What raylp adds to a teacher's work: tokens/s through `raylp distill` and by plain vLLM, the same prompts in one run.

    python benchmarks/distill.py MODEL SOURCES --pair en-de --examples 3 --batch-size 32 --repeats 2

MODEL: a checkpoint, as in a recipe. SOURCES: pairs, as a recipe's train split. Plain vLLM is given all prompts at once,
with the options of raylp's engines, in a process of its own. Tokens are those generated. `while it works`: from when
the first batch is done to the last one, the first one's tokens left out; plain vLLM knows no batches, so there a row
counts as done with the last row of what would be its batch. `from the start of the work`: engines' start included.
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
from typing import Any

from rich.console import Console
from rich.table import Table


def main() -> None:
    if sys.argv[1:2] == ["--plain"]:
        plain(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sources", type=Path)
    parser.add_argument("--pair", default="en-de")
    parser.add_argument("--examples", type=int, default=0, help="shown in the prompt")
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    if given.limit <= 2 * given.batch_size:
        parser.error("--limit: give several times the rows of a batch")
    from raylp.generate.vllm_engine import ONE_PROCESS

    found: dict[str, list[dict[str, float]]] = {"raylp": [], "plain vLLM": []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(given.repeats):
            job = Path(scratch) / "job.pickle"
            found["raylp"].append(by_raylp(given, Path(scratch) / f"run-{turn}", job))
            env = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **({} if _gpu() else ONE_PROCESS)}
            command = [sys.executable, __file__, "--plain", str(job)]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
            (line,) = (line for line in told.splitlines() if line.startswith("{"))  # vLLM may say something after it
            found["plain vLLM"].append(json.loads(line))
    print_table(found)


def by_raylp(given: argparse.Namespace, run_dir: Path, job: Path) -> dict[str, float]:
    """Tokens, and tokens/s in both ways of counting."""
    import ray

    from raylp.distill import stage
    from raylp.generate.vllm_engine import CPU_SEQUENCES, CPU_WORKER, cpu_options
    from raylp.pipeline import open_context
    from raylp.progress import Reporter
    from raylp.recipe import parse_recipe

    recipe = parse_recipe(
        {
            "model": given.model,
            "data": {given.pair: {"train": str(given.sources.resolve())}},
            "prompt": {"examples": given.examples},
            "distill": {"batch_size": given.batch_size, "limit": given.limit, "dtype": given.dtype},
            "run_dir": str(run_dir),
        }
    )
    arrived: list[tuple[float, int]] = []

    class Timed(stage.Parts):
        def add(self, said: Any) -> None:
            super().add(said)
            arrived.extend((time.monotonic(), len(one.tokens)) for one in said)

    stage.Parts = Timed  # type: ignore[misc]
    context = open_context(recipe, Reporter())
    config = recipe.distill
    assert config is not None
    teacher = stage._teacher(context, config)
    pairs = context.splits.train[: given.limit]
    requests = context.prompt.requests(teacher.tokenizer, [(pair.source, pair.pair) for pair in pairs])
    longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
    options: dict[str, Any] = {"dtype": teacher.dtype, "max_model_len": longest, "generation_config": "vllm", "seed": 0}
    if not _gpu():
        options |= {**cpu_options(teacher.path, teacher.dtype, longest, CPU_SEQUENCES), "worker_cls": CPU_WORKER}
    asked = [(list(request.tokens), request.max_new_tokens) for request in requests]
    job.write_bytes(pickle.dumps((str(teacher.path), options, asked, sorted(teacher.rule.stop), given.batch_size)))
    began = time.monotonic()
    stage.distill(context)
    ray.shutdown()
    return figures(arrived, given.batch_size, began)


def plain(job: Path) -> None:
    """Prints the same of vLLM alone."""
    began = time.monotonic()
    path, options, asked, stop, batch = pickle.loads(job.read_bytes())
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(path, **options)
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=most,
            stop_token_ids=stop,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for _, most in asked
    ]
    for number, ((tokens, _), own) in enumerate(zip(asked, params, strict=True)):
        engine.llm_engine.add_request(str(number), {"prompt_token_ids": tokens}, own)
    done: dict[int, tuple[float, int]] = {}
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            if output.finished:
                done[int(output.request_id)] = (time.monotonic(), len(output.outputs[0].token_ids))
    arrived: list[tuple[float, int]] = []
    for first in range(0, len(asked), batch):
        rows = [done[number] for number in range(first, min(first + batch, len(asked)))]
        last = max(when for when, _ in rows)
        arrived += [(last, tokens) for _, tokens in rows]
    print(json.dumps(figures(sorted(arrived), batch, began)))


def figures(arrived: list[tuple[float, int]], batch: int, began: float) -> dict[str, float]:
    """`arrived`: when rows were done, and their tokens. The first batch starts the clock; its tokens are left out."""
    first, tokens = arrived[batch - 1][0], sum(count for _, count in arrived)
    last = arrived[-1][0]
    return {
        "tokens": tokens,
        "working": sum(count for _, count in arrived[batch:]) / (last - first),
        "whole": tokens / (last - began),
    }


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def print_table(found: dict[str, list[dict[str, float]]]) -> None:
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in ("tokens", "working", "whole")}
        for name, each in found.items()
    }
    base = medians["plain vLLM"]
    table = Table("way", "tokens", "tokens/s while it works", "ratio", "from the start of the work", "ratio")
    for name, value in medians.items():
        ratios = {key: f"{value[key] / base[key]:.3f}" for key in ("working", "whole")}
        table.add_row(
            name, f"{value['tokens']:,.0f}", f"{value['working']:.1f}", ratios["working"], f"{value['whole']:.1f}",
            ratios["whole"],
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
