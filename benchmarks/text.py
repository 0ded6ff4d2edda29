"""Text that several benchmarks measure with."""

import json
from collections.abc import Sequence
from pathlib import Path


def short_sentences(source: Path, target: Path, max_words: int, cut: Sequence[str] = ("train", "dev", "test")) -> Path:
    """The files of a pair in `target`, those of the splits `cut` without long sentences, which take most of the time;
    made once.
    """
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        if not (target / f"{split}.jsonl").exists():
            lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            short = [line for line in lines if len(json.loads(line)["source"].split()) <= max_words]
            kept = short if split in cut else lines
            (target / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return target
