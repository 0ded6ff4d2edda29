"""Whether two load generators say the same of one endpoint: raylp's and vLLM's own benchmark module, taking turns.

    python benchmarks/generators.py RUN --model baseline --concurrency 1,4 --requests 100 --repeats 3

RUN is a run directory with that model and test text. Both send the same prompts, ask for the same number of tokens and
reuse nothing of each other's prompts. Figures are of all repeats: medians of requests, and tokens over seconds.
"""

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from run_dirs import open_run

from raylp.bench.load import Answering, Load, Measurement, measure
from raylp.bench.stage import sentences_that_fit
from raylp.context import Context
from raylp.generate.base import Request
from raylp.models.load import load_tokenizer
from raylp.serve.endpoint import endpoint

LATENCIES = {
    "TTFT p50, ms": ("ttft_ms", "ttfts"),
    "TPOT p50, ms": ("tpot_ms", "tpots"),
    "whole p50, ms": ("e2e_ms", "e2els"),
}
THEIRS = (
    "import argparse, sys; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args(sys.argv[1:]))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", default="baseline")
    parser.add_argument("--concurrency", default="1,4")
    parser.add_argument("--requests", type=int, default=100, help="of a measurement")
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    context, name, path = open_run(given.run, given.model)
    prompts = sentences_that_fit(context, given.requests, given.output_tokens)
    loads = [Load("closed", int(clients)) for clients in given.concurrency.split(",")]
    found: dict[tuple[str, str], list[Any]] = {}
    with endpoint(context, {name: path}) as served, tempfile.TemporaryDirectory() as scratch:
        measure(served.url, name, prompts[:8], Load("closed", 4), Answering(given.output_tokens))
        for repeat in range(given.repeats):
            for load in loads:
                for who in ("raylp", "vllm")[:: 1 if repeat % 2 == 0 else -1]:
                    if who == "raylp":
                        made: Any = measure(served.url, name, prompts, load, Answering(given.output_tokens))
                    else:
                        made = by_vllm(
                            context, served.url, name, path, prompts, load, given.output_tokens, Path(scratch)
                        )
                    found.setdefault((who, load.name), []).append(made)
                    print(f"repeat {repeat + 1} of {given.repeats}, {load.name}, {who}", file=sys.stderr, flush=True)
    print_table(loads, found)


def by_vllm(
    context: Context,
    url: str,
    name: str,
    path: Path,
    prompts: Sequence[Request],
    load: Load,
    tokens: int,
    scratch: Path,
) -> dict[str, Any]:
    """What vLLM's benchmark module writes of one measurement."""
    tokenizer = load_tokenizer(path)
    texts = [tokenizer.decode(prompt.tokens, skip_special_tokens=True) for prompt in prompts]
    (scratch / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    extra = {"cache_salt": secrets.token_hex(8), "min_tokens": tokens, "temperature": 0}
    options: dict[str, Any] = {
        "backend": "openai",
        "base-url": url,
        "endpoint": "/v1/completions",
        "model": name,
        "tokenizer": path,
        "dataset-name": "custom",
        "dataset-path": scratch / "prompts.jsonl",
        "custom-output-len": tokens,
        "num-prompts": len(prompts),
        "max-concurrency": int(load.value),
        "extra-body": json.dumps(extra),
        "result-dir": scratch,
        "result-filename": "result.json",
        "percentile-metrics": "ttft,tpot,itl,e2el",
    }
    switches = ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--save-result", "--save-detailed"]
    command = [sys.executable, "-c", THEIRS, *switches, "--disable-tqdm"]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads((scratch / "result.json").read_text())
    assert result["completed"] == len(prompts), result
    assert result["total_input_tokens"] == sum(len(prompt.tokens) for prompt in prompts), "the same prompts"
    return result


def print_table(loads: Sequence[Load], found: dict[tuple[str, str], list[Any]]) -> None:
    table = Table("load", "measure", "requests", "raylp", "vLLM's", "raylp / vLLM's")
    for load in loads:
        ours: list[Measurement] = found["raylp", load.name]
        theirs: list[dict[str, Any]] = found["vllm", load.name]
        requests = sum(len(m.timings) for m in ours)
        for what, (key, name) in LATENCIES.items():
            mine = float(np.median([getattr(t, key) for m in ours for t in m.timings]))
            its = float(np.median([value for r in theirs for value in detailed(r, name)]))
            table.add_row(load.name, what, str(requests), f"{mine:.1f}", f"{its:.1f}", f"{mine / its:.3f}")
        mine = sum(m.tokens for m in ours) / sum(m.seconds for m in ours)
        its = sum(r["total_output_tokens"] for r in theirs) / sum(r["duration"] for r in theirs)
        table.add_row(load.name, "tokens/s", str(requests), f"{mine:.1f}", f"{its:.1f}", f"{mine / its:.3f}")
    Console(width=110).print(table)


def detailed(result: dict[str, Any], name: str) -> list[float]:
    """Milliseconds of every request; a whole request is its first token and the waits between the others."""
    whole = [first + sum(waits) for first, waits in zip(result["ttfts"], result["itls"], strict=True)]
    if name == "e2els":
        return [1000 * seconds for seconds in whole]
    if name == "tpots":
        pairs = zip(result["itls"], result["output_lens"], strict=True)
        return [1000 * sum(waits) / max(1, tokens - 1) for waits, tokens in pairs]
    return [1000 * seconds for seconds in result[name]]


if __name__ == "__main__":
    main()
