"""Different sets of layers taken out of one model, healed alike for a few steps, on the same test sentences.

    python benchmarks/healed_alike.py --model DIR --pair en-de --train train.jsonl --test test.jsonl \
        --set exhaustive=13,16,2 --set race=13,16,9 --steps 75

Each set is healed by adapters on the same batches in the same order, and translates the test sentences. Prints chrF++
with 95% intervals, and the paired difference to the first set. What was translated is kept under --out.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from raylp.data.corpus import Pair, read_pairs
from raylp.data.prompt import Prompt, choose_examples
from raylp.generate.transformers_view import TransformersGenerator
from raylp.heal.examples import choose, tokenise
from raylp.metrics.intervals import paired_difference, score_with_interval
from raylp.metrics.ngram import metric
from raylp.models.load import load_model, load_tokenizer
from raylp.models.source import fingerprint, locate
from raylp.search.short_heal import ShortHeal, chosen_examples, healed

MAX_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, a hub id, or package:NAME")
    parser.add_argument("--pair", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--set", action="append", required=True, help="NAME=LAYERS, such as race=13,16,9; several")
    parser.add_argument("--num-examples", type=int, default=3, help="training pairs shown in the prompt")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--sentences", type=int, default=100_000, help="of the test text, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/healed-alike"))
    args = parser.parse_args()
    sets = {
        name: tuple(map(int, layers.split(","))) for name, _, layers in (given.partition("=") for given in args.set)
    }
    path = locate(args.model)
    train, test = read_pairs(args.train, args.pair), read_pairs(args.test, args.pair)[: args.sentences]
    prompt = Prompt(examples=choose_examples(train, args.num_examples))
    options = ShortHeal(steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate)
    said = {name: translations(path, layers, prompt, train, test, options, args.out) for name, layers in sets.items()}
    chrf = metric("chrF2++")
    references = [pair.target for pair in test]
    rows = {name: chrf.statistics(texts, references) for name, texts in said.items()}
    first = next(iter(rows.values()))
    table = Table(
        title=f"{args.model}, {args.pair}, {len(test)} sentences, {args.steps} steps of {args.batch_size}",
        title_justify="left",
    )
    for column in ("", "removed", "chrF2++", "difference to the first"):
        table.add_column(column)
    for name, own in rows.items():
        score, gap = score_with_interval(chrf, own), paired_difference(chrf, own, first)
        told = f"{gap.value:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})" if own is not first else ""
        table.add_row(name, str(list(sets[name])), f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})", told)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def translations(
    path: Path,
    removed: tuple[int, ...],
    prompt: Prompt,
    train: list[Pair],
    test: list[Pair],
    options: ShortHeal,
    out: Path,
) -> list[str]:
    """What the model says without the layers, after the heal; from its file, if it is there."""
    texts_of = [pair.as_dict() for pair in (*train, *test)]
    asked = [fingerprint(path), sorted(removed), options.model_dump(), prompt.model_dump(mode="json"), texts_of]
    file = out / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        started = time.perf_counter()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_model(path, "float32", device), load_tokenizer(path)
        examples = tokenise(choose(train, [], "authentic", prompt.examples), prompt, tokenizer, MAX_TOKENS)
        requests = prompt.requests(tokenizer, [(pair.source, pair.pair) for pair in test])
        with healed(model, removed, chosen_examples(examples, options), options):
            texts = [output.text for output in TransformersGenerator(model, tokenizer).generate(requests)]
        out.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(texts, ensure_ascii=False))
        partial.replace(file)
        print(f"without {list(removed)}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
