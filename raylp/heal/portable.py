"""A training's state that any number of workers goes on with: trained weights and Adam's moments by name, whole.

ZeRO shares the optimizer's state out, and a checkpoint of its parts fits the number of workers that wrote it. Through
DeepSpeed's access to whole states each tensor is put together, one at a time, and taken apart again.
"""

from collections.abc import Mapping
from typing import Any

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"


def gather(engine: Any, keep: bool) -> dict[str, Any]:
    """Weights and moments in float32 on the CPU, as `<parameter>|weight` and so on; all workers take part, and those
    that `keep` have them.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in _trained(engine):
        for what in (WEIGHT, *MOMENTS):
            whole = (
                safe_get_full_fp32_param(parameter)
                if what == WEIGHT
                else safe_get_full_optimizer_state(parameter, what)
            )
            if keep:
                found[f"{name}|{what}"] = whole.detach().float().to("cpu", copy=True).contiguous()
    return found


def scatter(engine: Any, state: Mapping[str, Any], steps: int) -> None:
    """Puts the engine where one with the `state` was after so many steps, its own workers each taking their part.

    The optimizer must have made its state: it does so in a first step, which may be one of a rate of nothing.
    """
    import deepspeed
    import torch
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    for name, parameter in _trained(engine):
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded), torch.no_grad():
            if not sharded or deepspeed.comm.get_rank() == 0:
                parameter.data.copy_(state[f"{name}|{WEIGHT}"])
        for what in (WEIGHT, *MOMENTS):
            value = state[f"{name}|{what}"].to(parameter.device)
            if sharded:
                value = _part(value, parameter.ds_tensor.numel())
            if what == WEIGHT:
                (safe_set_local_fp32_param if sharded else safe_set_full_fp32_param)(parameter, value)
            else:
                (safe_set_local_optimizer_state if sharded else safe_set_full_optimizer_state)(parameter, value, what)
    for own in engine.optimizer.optimizer.state.values():
        own["step"] = torch.full_like(own["step"], steps) if torch.is_tensor(own["step"]) else steps


def _part(value: Any, size: int) -> Any:
    """This worker's of a tensor that is cut into parts of `size`, the last filled up with zeros."""
    import deepspeed
    import torch

    start = deepspeed.comm.get_rank() * size
    flat = torch.nn.functional.pad(value.flatten(), (0, max(0, start + size - value.numel())))
    return flat[start : start + size]


def _trained(engine: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
