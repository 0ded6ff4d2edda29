"""What Ray adds to scoring: the same units in this process and by one worker of the pool.

    python benchmarks/ray_overhead.py MODEL SOURCES --pair en-de --sentences 64 --remove 3 --remove 5

MODEL: a checkpoint, as in a recipe (a directory, a hub id, `package:NAME`). SOURCES: text, one sentence a line. A unit
is a block of sentences without one of the layers `--remove`. Both run every unit once to warm up, then take turns; the
figures are the medians over `--repeats`, and the ratio is Ray's time to that of this process.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from raylp import cluster
from raylp.data.prompt import Prompt
from raylp.generate.base import Output
from raylp.generate.pool import Pool, make_generator
from raylp.models.load import load_tokenizer
from raylp.models.source import locate
from raylp.progress import Reporter
from raylp.recipe import Resources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sources", type=Path)
    parser.add_argument("--pair", default="en-de")
    parser.add_argument("--template", default=Prompt().template)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--remove", type=int, action="append", help="a layer to leave out; several: so many candidates")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    path = locate(arguments.model)
    sentences = arguments.sources.read_text(encoding="utf-8").splitlines()[: arguments.sentences]
    prompt = Prompt(template=arguments.template)
    requests = prompt.requests(load_tokenizer(path), [(line, arguments.pair) for line in sentences])
    blocks = [requests[start : start + arguments.block] for start in range(0, len(requests), arguments.block)]
    units = [(block, (layer,)) for layer in arguments.remove or [1] for block in blocks]

    cluster.start(Resources())
    torch.set_num_threads(cluster.cores())
    generator = make_generator(path, "transformers", arguments.dtype, prompt.newline)

    def here() -> list[list[Output]]:
        return [generator.generate(block, removed) for block, removed in units]

    with tempfile.TemporaryDirectory() as log, Reporter(quiet=True).task("units") as task:
        pool = Pool(1, prompt.newline, Path(log))

        def submit(worker: Any, unit: Any) -> Any:
            return worker.translate.remote(str(path), "transformers", arguments.dtype, *unit)

        def by_ray() -> list[list[Output]]:
            found = {id(unit): outputs for unit, (outputs, _) in pool.run(units, submit, task)}
            return [found[id(unit)] for unit in units]

        try:
            if here() != by_ray():
                raise SystemExit("the worker's outputs are not those of this process")
            times: dict[str, list[float]] = {"process": [], "ray": []}
            for _ in range(arguments.repeats):
                for name, way in (("process", here), ("ray", by_ray)):
                    started = time.perf_counter()
                    way()
                    times[name].append(time.perf_counter() - started)
        finally:
            pool.close()
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratio = seconds["ray"] / seconds["process"]
    print(json.dumps({"units": len(units), "seconds": seconds, "all": times, "ratio": round(ratio, 4)}))


if __name__ == "__main__":
    main()
