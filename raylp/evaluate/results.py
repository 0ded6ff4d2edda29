"""results.json: what evaluate and bench found, put together in the form the contract fixes."""

from typing import Any

from raylp.rundir import RunDir

SCHEMA = 1


def write_results(rundir: RunDir) -> dict[str, Any]:
    """Joins evaluate.json and bench.json, as far as they are there, and writes results.json."""
    quality = rundir.read_json("evaluate.json") if rundir.exists("evaluate.json") else {"models": [], "comparisons": []}
    measured = rundir.read_json("bench.json") if rundir.exists("bench.json") else {"models": {}}
    speed, scored = measured["models"], {model["name"] for model in quality["models"]}
    unscored = [
        {"name": name, **measured.get("sizes", {}).get(name, {}), "scores": {}} for name in speed if name not in scored
    ]
    models = [*quality["models"], *unscored]
    results = {
        "schema": SCHEMA,
        "models": [{**model, "speed": speed.get(model["name"], {})} for model in models],
        "comparisons": quality["comparisons"],
    }
    rundir.write_json("results.json", results)
    return results
