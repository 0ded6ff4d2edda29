"""What `raylp distill` holds in memory for so many rows: the driver's, and that of all its processes together.

    python benchmarks/distill_memory.py MODEL SOURCES --pair xx-yy --template '{source} =' --rows 1000,10000,100000

MODEL: a checkpoint, as in a recipe, small and quick. SOURCES: pairs, as a recipe's train split; they are repeated, each
time with another number before them, until there are enough. A driver of its own translates and filters them all;
memory is what is not shared (USS), looked at every two seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sources", type=Path)
    parser.add_argument("--pair", default="en-de")
    parser.add_argument("--template", default="{source} =")
    parser.add_argument("--rows", default="1000,10000,100000")
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    table = Table("rows", "kept", "seconds", "rows/s", "driver, GB", "all processes, GB")
    for rows in map(int, given.rows.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            table.add_row(*measure(given, rows, Path(scratch)))
        Console(width=100).print(table)


def measure(given: argparse.Namespace, rows: int, scratch: Path) -> list[str]:
    """A line of the table."""
    lines = [json.loads(line) for line in given.sources.read_text(encoding="utf-8").splitlines()]
    with (scratch / "train.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            line, turn = lines[number % len(lines)], number // len(lines)
            text = {"id": str(number), "source": f"{turn} {line['source']}", "target": f"{turn} {line['target']}"}
            stream.write(json.dumps(text, ensure_ascii=False) + "\n")
    recipe = {
        "model": given.model,
        "data": {given.pair: {"train": str(scratch / "train.jsonl")}},
        "prompt": {"template": given.template},
        "distill": {"batch_size": given.batch_size, "filters": {"language": False}},
        "run_dir": str(scratch / "run"),
    }
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    began = time.monotonic()
    command = [sys.executable, "-m", "raylp", "distill", str(scratch / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    driver, together = 0, 0
    while process.poll() is None:
        own = _private(psutil.Process(process.pid))
        children = psutil.Process(process.pid).children(recursive=True)
        driver, together = max(driver, own), max(together, own + sum(map(_private, children)))
        time.sleep(2)
    if process.returncode:
        raise SystemExit(f"distill of {rows} rows failed")
    seconds = time.monotonic() - began
    summary = json.loads((scratch / "run" / "distill" / "summary.json").read_text())
    assert summary["rows"] == rows
    return [
        *(f"{rows:,}", f"{summary['kept']:,}", f"{seconds:.0f}", f"{rows / seconds:.0f}"),
        *(f"{driver / 1e9:.2f}", f"{together / 1e9:.2f}"),
    ]


def _private(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
