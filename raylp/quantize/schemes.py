"""The schemes a model can be quantised by: what each stores, who makes it, and what runs it."""

from dataclasses import dataclass
from typing import Literal, get_args

from raylp import names

Name = Literal[
    "w8a8", "gptq", "awq", "fp8", "int8", "nf4", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8"
]


@dataclass(frozen=True)
class Scheme:
    """`bits` of a weight; `maker`: the library that makes the checkpoint, `engine`: the one that runs it. Where vLLM is
    the maker, the checkpoint's weights stay as they are, and each start of the engine quantises them.

    `on_cpu`: whether there are kernels for a CPU, `avx512`: on x86 only for one with AVX-512; `calibrated`: whether
    text is needed to make it.
    """

    bits: int
    what: str
    maker: Literal["llm-compressor", "bitsandbytes", "vllm"]
    engine: Literal["vllm", "transformers"]
    on_cpu: bool = True
    calibrated: bool = True
    avx512: bool = False


# vLLM 0.29 runs no checkpoints of bitsandbytes, and transformers has no kernels for llm-compressor's. Its build for
# x86 CPUs without AVX-512 lacks the products of 4-bit weights, and says so only at the first one.
SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(8, "8-bit weights rounded by GPTQ, 8-bit activations", "llm-compressor", "vllm"),
    "gptq": Scheme(4, "4-bit weights rounded by GPTQ", "llm-compressor", "vllm", avx512=True),
    "awq": Scheme(4, "4-bit weights scaled by AWQ", "llm-compressor", "vllm", avx512=True),
    "fp8": Scheme(8, "8-bit floating point weights and activations", "llm-compressor", "vllm", False, False),
    "int8": Scheme(8, "LLM.int8, 8-bit weights but for outliers", "bitsandbytes", "transformers", calibrated=False),
    "nf4": Scheme(4, "4-bit normal floats, quantised twice", "bitsandbytes", "transformers", calibrated=False),
    **{
        name: Scheme(8, f"weights quantised as they are loaded, {what}", "vllm", "vllm", False, False)
        for name, what in (
            ("fp8_per_tensor", "8-bit floating point, a scale for each matrix"),
            ("fp8_per_channel", "8-bit floating point, a scale for each output"),
            ("fp8_per_block", "8-bit floating point, a scale for each 128 x 128 block"),
            ("mxfp8", "8-bit floating point, a scale for each 32 weights"),
        )
    },
}
assert set(SCHEMES) == set(get_args(Name)) == set(names.SCHEMES)
