"""A run as a Ray job: the project directory goes along, the log comes back."""

import filecmp
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from raylp import cluster
from raylp.errors import UserError
from raylp.recipe import Recipe, differences, load_recipe

POLL_S = 1.0
ORIGIN = "RAYLP_SUBMITTED_FROM"  # in a job's environment: the directory that it runs in a copy of
NEVER_SENT = [
    ".git",
    ".venv",
    ".venv-comet",
    ".venv-quantize",
    "runs",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "build",
]


def job_entrypoint(recipe: str, overrides: list[str], python: str) -> str:
    """The shell command of the job; `recipe` is relative to the directory that is sent.

    `python` is named because `ray job submit` runs whatever `python` is first on the head's PATH, which need not be
    the one with Ray in it; jobs/run.py says so when it is the wrong one.
    """
    sets = [part for override in overrides for part in ("--set", override)]
    return shlex.join([python, "jobs/run.py", recipe, *sets])


def submit(recipe: Path, overrides: list[str], address: str, python: str, follow: bool, out: TextIO) -> int:
    """Submits the recipe to the cluster at `address`; with `follow`, writes the job's log to `out` until it ends.

    Returns 0 when the job succeeded (or was submitted, without `follow`), else 1.

    Raises:
        UserError: the recipe is wrong, is not below the current directory, or the cluster does not answer.
    """
    cluster.use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    loaded = load_recipe(recipe, overrides)
    root = Path.cwd()
    overrides = [*overrides, *_from_here(loaded, root)]
    try:
        inside = recipe.resolve().relative_to(root)
    except ValueError as error:
        raise UserError(
            f"recipe {recipe} is not below {root}, which is what the job is sent: run submit from its root"
        ) from error
    if not (root / "jobs" / "run.py").exists():
        raise UserError(f"{root} has no jobs/run.py: run submit from the project's root directory")
    os.environ.setdefault("RAY_RUNTIME_ENV_WORKING_DIR_CACHE_SIZE_GB", "2")
    env = {"PYTHONUNBUFFERED": "1", ORIGIN: str(root)}
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=job_entrypoint(str(inside), overrides, python),
            runtime_env={"working_dir": str(root), "excludes": NEVER_SENT, "env_vars": env},
        )
    except AuthenticationError as error:
        raise UserError(
            f"the cluster at {address} wants a token: put it into ~/.ray/auth_token, or set RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray dashboard answers at {address} ({_short(error)}): start Ray, or check --address", 1
        ) from error
    print(f"job {job}", file=out, flush=True)
    if not follow:
        return 0
    written = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        out.write(log[written:])
        out.flush()
        written = len(log)
        if status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
            print(f"job {job}: {status.value.lower()}", file=out)
            return 0 if status == JobStatus.SUCCEEDED else 1
        time.sleep(POLL_S)


def lasting(recipe: str, overrides: Sequence[str]) -> str:
    """In a job: the recipe in the directory that was submitted, if this machine sees that, and recipe and data there
    are those of the job's copy. Ray throws the copy away, and a run directory names the text it was made with.
    """
    there = os.path.join(os.environ.get(ORIGIN, ""), recipe)
    if not os.path.isabs(there) or not os.path.isfile(there):
        return recipe
    try:
        copied, kept = (load_recipe(place, list(overrides)) for place in (recipe, there))
        came = all(map(os.path.isfile, copied.data_files()))
        # A model or a metric beside the recipe is among the differences: it came along, and may be another there.
        same = came and filecmp.cmp(recipe, there, False) and not differences(copied, kept)
    except (UserError, OSError):
        return recipe
    return there if same else recipe


def _from_here(recipe: Recipe, root: Path) -> list[str]:
    """Overrides that keep directories where they are meant: a job runs in a copy that Ray throws away."""
    places = {"run_dir": recipe.run_dir, "cache": recipe.cache}
    near = {key: Path(place).expanduser() for key, place in places.items() if place and "://" not in place}
    return [f"{key}={root / path}" for key, path in near.items() if str(path) != places[key] or not path.is_absolute()]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
