"""The `evaluate` section of a recipe."""

from collections import Counter
from typing import Literal

from pydantic import Field, field_validator

from raylp.config import Section
from raylp.metrics.registry import full_name, short_name


class Evaluate(Section):
    """`models`: names of models of the run (`healed` and `pruned`: the run's own of the kind), or all of them.
    `metrics`: chrF2++, BLEU, and COMET checkpoints (`wmt22-comet-da`, `owner/name` on the hub, or a path).

    `resamples`: of the bootstrap behind every interval (95%).
    """

    models: list[str] | None = Field(None, min_length=1)
    metrics: list[str] = Field(["chrF2++", "BLEU"], min_length=1)
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    resamples: int = Field(1000, ge=100)

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        names = [full_name(name) for name in value]
        for name, count in Counter(map(short_name, names)).items():
            if count > 1:
                raise ValueError(f"{name} is there {count} times: scores are filed under that name, so name it once")
        return names
