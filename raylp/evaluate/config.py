"""The `evaluate` section of a recipe."""

from typing import Literal

from pydantic import Field, field_validator

from raylp.config import Section


class Evaluate(Section):
    """`resamples`: of the bootstrap behind every interval (95%)."""

    metrics: list[Literal["chrF2++", "BLEU"]] = ["chrF2++", "BLEU"]
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    resamples: int = Field(1000, ge=100)

    @field_validator("metrics", mode="before")
    @classmethod
    def _usual_names(cls, value: list[str]) -> list[str]:
        usual = {"chrf++": "chrF2++", "chrf2++": "chrF2++", "bleu": "BLEU"}
        return [usual.get(str(name).lower(), name) for name in value]
