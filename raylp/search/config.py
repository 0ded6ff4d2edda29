"""The `search` section of a recipe."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylp.config import Section


class Search(Section):
    """How many layers go, and how candidates are scored.

    Exactly one of `layers` (how many stay), `remove` (how many go) and `given` (which go, in the original model's
    numbers: a published list, no search) is set.
    """

    layers: int | None = Field(None, ge=1)
    remove: int | None = Field(None, ge=1)
    given: list[int] | None = None
    protect: list[int] = [0, -1]
    metric: Literal["chrF2++"] = "chrF2++"
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    block: int = Field(16, ge=1)

    @field_validator("metric", mode="before")
    @classmethod
    def _usual_name(cls, value: str) -> str:
        return "chrF2++" if str(value).lower() in ("chrf++", "chrf2++") else value

    @model_validator(mode="after")
    def _one_target(self) -> "Search":
        if sum(value is not None for value in (self.layers, self.remove, self.given)) != 1:
            raise ValueError("set one of layers (how many stay), remove (how many go), given (which go)")
        return self
