"""How many resident models a cluster takes, and what share of its GPUs each gets. Pure arithmetic, without Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raylp.errors import UserError

GPU_SHARE = 0.9  # of a GPU's memory that can be used
GPU_BYTES = 3e9  # beside the weights: CUDA context, activations, keys and values of a batch
MAX_PER_GPU = 4  # more small models on one GPU only wait for each other
CPU_BYTES = 2e9  # interpreter, libraries, activations and cache of a worker with a small model, on the CPU
MAX_ON_CPU = 4


@dataclass(frozen=True)
class Layout:
    """`workers` resident models; each gets `gpus` GPUs (a fraction: several share one; 0: CPUs)."""

    workers: int
    gpus: float = 0.0


def gpus_per_model(weights_bytes: float, gpu_bytes: float) -> float:
    """GPUs one resident model takes: 1/n where n fit on one, else a whole number of them.

    `weights_bytes`: of the model in its dtype; `gpu_bytes`: memory of one GPU.

    Raises:
        UserError: the GPUs are too small for any model.
    """
    room = GPU_SHARE * gpu_bytes
    if room <= GPU_BYTES:
        raise UserError(
            f"a GPU has {gpu_bytes / 1e9:.1f} GB of memory, {GPU_BYTES / 1e9:.1f} GB are needed beside the weights: "
            f"use larger GPUs, or set resources.gpus: 0"
        )
    if weights_bytes + GPU_BYTES <= room:
        return 1 / min(MAX_PER_GPU, int(room // (weights_bytes + GPU_BYTES)))
    return float(math.ceil(weights_bytes / (room - GPU_BYTES)))


def on_gpus(
    nodes: Sequence[float],
    gpu_bytes: float,
    weights_bytes: float,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
) -> Layout:
    """The layout on GPUs. `nodes`: how many GPUs each node has; None: as many models, as large a share, as fit.

    A model that takes several GPUs needs them in one node.

    Raises:
        UserError: the model does not fit, or not as often as asked; with what it needs and what is there.
    """
    needed = gpus_per_model(weights_bytes, gpu_bytes)
    share = gpus_per_worker or needed
    if share > 1 and share != int(share):
        raise UserError(f"resources.gpus_per_worker: {share:g}: more than one GPU must be a whole number of them")
    places = sum(places_in(count, share) for count in nodes)
    model = f"the model ({weights_bytes / 1e9:.1f} GB of weights)"
    there = f"the cluster has nodes with {', '.join(f'{count:g}' for count in nodes)} GPUs of {gpu_bytes / 1e9:.0f} GB"
    if share < needed - 1e-9:
        raise UserError(
            f"resources.gpus_per_worker: {share:g}: {model} takes {needed:.2g} GPUs of {gpu_bytes / 1e9:.0f} GB; "
            f"raise it to that or leave it out"
        )
    if places == 0:
        raise UserError(
            f"{model} takes {share:g} GPUs in one node, {there}: use larger GPUs or nodes with more of them"
        )
    if workers is not None and workers > places:
        raise UserError(
            f"resources.workers: {workers}: {model} takes {share:.2g} GPUs each, {there}, room for {places}: lower it"
        )
    return Layout(workers or places, share)


def places_in(gpus: float, share: float) -> int:
    """How many models with `share` GPUs each a node with so many takes; a share below 1 stays on one GPU."""
    return int(gpus // share) if share >= 1 else int(gpus) * int(1 / share + 1e-9)


def on_cpus(
    cores: int, free_bytes: float, weights_bytes: float, workers: int | None = None, shared: bool = True
) -> Layout:
    """The layout on one machine's CPUs, where all workers share one copy of the weights, or each has its own.

    Raises:
        UserError: the memory that is free is too little; with both numbers.
    """
    common, each = (weights_bytes, CPU_BYTES) if shared else (0.0, weights_bytes + CPU_BYTES)
    needed = common + (workers or 1) * each
    if needed > free_bytes:
        what, remedy = ("the model needs", "close other programs or take a smaller model")
        if workers is not None:
            what, remedy = (f"{workers} workers need", "lower resources.workers or close other programs")
        raise UserError(f"{what} about {needed / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} GB are free: {remedy}")
    return Layout(workers or int(max(1, min(cores, MAX_ON_CPU, (free_bytes - common) // each))))
