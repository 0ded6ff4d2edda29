"""What `ray job submit` runs: `python jobs/run.py RECIPE [--set key=value ...]`, all stages, on the job's cluster."""

import importlib.util
import os
import sys


def main() -> None:
    """Runs the recipe; the cluster is the one the job is on."""
    missing = [name for name in ("ray", "torch", "transformers", "typer") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"this job runs under {sys.executable}, which lacks {', '.join(missing)}: name the cluster's Python with "
            f"raylp submit --python PATH"
        )
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.path.insert(0, os.getcwd())
    from raylp.cli import main as raylp
    from raylp.submit import lasting

    recipe, sets = sys.argv[1:2], sys.argv[2:]
    raylp(["run", *(lasting(path, sets[1::2]) for path in recipe), *sets])


if __name__ == "__main__":
    main()
