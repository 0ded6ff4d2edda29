"""The schemes a model can be quantised by: what each stores, who makes it, and what runs it."""

from dataclasses import dataclass
from typing import Literal, get_args

from raylp import names

Name = Literal["w8a8", "gptq", "awq", "fp8", "int8", "nf4"]


@dataclass(frozen=True)
class Scheme:
    """`bits` of a weight; `maker`: the library that makes the checkpoint, `engine`: the one that runs it.

    `on_cpu`: whether there are kernels for a CPU; `calibrated`: whether text is needed to make it.
    """

    bits: int
    what: str
    maker: Literal["llm-compressor", "bitsandbytes"]
    engine: Literal["vllm", "transformers"]
    on_cpu: bool = True
    calibrated: bool = True


# vLLM 0.29 runs no checkpoints of bitsandbytes, and transformers has no kernels for llm-compressor's.
SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(8, "8-bit weights rounded by GPTQ, 8-bit activations", "llm-compressor", "vllm"),
    "gptq": Scheme(4, "4-bit weights rounded by GPTQ", "llm-compressor", "vllm"),
    "awq": Scheme(4, "4-bit weights scaled by AWQ", "llm-compressor", "vllm"),
    "fp8": Scheme(8, "8-bit floating point weights and activations", "llm-compressor", "vllm", False, False),
    "int8": Scheme(8, "LLM.int8, 8-bit weights but for outliers", "bitsandbytes", "transformers", calibrated=False),
    "nf4": Scheme(4, "4-bit normal floats, quantised twice", "bitsandbytes", "transformers", calibrated=False),
}
assert set(SCHEMES) == set(get_args(Name)) == set(names.SCHEMES)
