"""Quantises a checkpoint by bitsandbytes: `python -m raylp.quantize.bits JOB`, with the job of `compress.py`."""

import json
import sys
from pathlib import Path

from raylp.models.load import load_quantised


def main() -> None:
    """In a process that gives its memory back."""
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load_quantised(Path(job["source"]), "bfloat16", device, job["scheme"]).save_pretrained(job["target"])


if __name__ == "__main__":
    main()
