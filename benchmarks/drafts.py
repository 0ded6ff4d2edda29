"""What drafts save: pruned views translate with the whole model's output as a draft, and without.

    python benchmarks/drafts.py MODEL SOURCES --pair en-de --remove 9 --remove 17 --step-tokens 8 --step-tokens 32

MODEL: a checkpoint, as in a recipe. SOURCES: text, one sentence a line. `--step-tokens`: how many tokens a forward may
take to check drafts; several are compared, in turns. Prints a line of JSON for each layer left out: seconds (the least
of `--repeats`), the share of the draft that stands at the beginning of the output, and how many outputs are equal.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from raylp.data.prompt import Prompt
from raylp.generate.pool import make_generator
from raylp.generate.transformers_view import TransformersGenerator
from raylp.models.load import load_tokenizer
from raylp.models.source import locate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sources", type=Path)
    parser.add_argument("--pair", default="en-de")
    parser.add_argument(
        "--targets", type=Path, help="translations of the sources: the last three are shown as examples"
    )
    parser.add_argument("--sentences", type=int, default=16)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--remove", type=int, action="append")
    parser.add_argument("--step-tokens", type=int, action="append")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()

    path = locate(arguments.model)
    lines = arguments.sources.read_text(encoding="utf-8").splitlines()
    examples = {}
    if arguments.targets:
        targets = arguments.targets.read_text(encoding="utf-8").splitlines()
        examples = {arguments.pair: list(zip(lines, targets, strict=True))[-3:]}
    requests = Prompt(examples=examples).requests(
        load_tokenizer(path), [(line, arguments.pair) for line in lines[: arguments.sentences]]
    )
    generator = make_generator(path, "transformers", arguments.dtype, True, arguments.batch)
    assert isinstance(generator, TransformersGenerator)
    drafts = [output.tokens for output in generator.generate(requests)]
    widths = [0, *(arguments.step_tokens or [8, 16, 32])]
    for layer in arguments.remove or [1]:
        seconds: dict[int, float] = {}
        outputs = {}
        for _ in range(arguments.repeats):
            for width in widths:
                generator.step_tokens = width or 1
                started = time.perf_counter()
                outputs[width] = generator.generate(requests, (layer,), drafts if width else None)
                seconds[width] = min(seconds.get(width, float("inf")), time.perf_counter() - started)
        kept = sum(_common(draft, output.tokens) for draft, output in zip(drafts, outputs[0], strict=True))
        result = {
            "removed": layer,
            "seconds": {str(width or "no draft"): round(value, 3) for width, value in seconds.items()},
            "draft_kept": round(kept / sum(map(len, drafts)), 3),
            "tokens": sum(len(output.tokens) for output in outputs[0]),
            "same": [sum(a == b for a, b in zip(outputs[0], outputs[width], strict=True)) for width in widths[1:]],
        }
        print(json.dumps(result), flush=True)


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


if __name__ == "__main__":
    main()
