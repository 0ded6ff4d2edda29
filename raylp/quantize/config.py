"""The `quantize` section of a recipe."""

from typing import Literal

from pydantic import Field, field_validator

from raylp.config import Section
from raylp.quantize.schemes import SCHEMES, Name


class Quantize(Section):
    """`models`: names of models of the run (`healed` and `pruned`: the run's own of the kind); each gives a checkpoint
    by each of `schemes`, called such as healed-14-gptq.

    `sentences`: training pairs that w8a8, gptq and awq are calibrated on; `group_size`: weights that share a scale, of
    gptq and awq (sizes that vLLM has kernels for). The vocabulary stays as it is.
    """

    models: list[str] = Field(["baseline", "healed"], min_length=1)
    schemes: list[Name] = Field(["w8a8"], min_length=1)
    sentences: int = Field(128, ge=1)
    group_size: Literal[32, 64, 128] = 128

    @property
    def calibrated(self) -> bool:
        """Whether training text is needed."""
        return any(SCHEMES[scheme].calibrated for scheme in self.schemes)

    @field_validator("schemes", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("models", "schemes")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))
