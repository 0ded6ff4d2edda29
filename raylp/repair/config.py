"""The `repair` section of a recipe."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylp.config import Section

Method = Literal["compensate", "merge", "concatenate"]


class Repair(Section):
    """`methods`: each gives a checkpoint of its own beside the pruned one, under models/.

    `compensate`: later layers are scaled to the smaller stream they now find (Prune&Comp); `merge`: a layer that stays
    takes in the differences of those that go (LaCo); `concatenate`: it takes in their most important channels (CoMe).
    `sentences`: that states are measured on. `merge_above`: a merge counts where the last states' cosine with the whole
    model's is above it (default: above what plain removal leaves).
    """

    methods: list[Method] = Field(["compensate"], min_length=1)
    sentences: int = Field(64, ge=1)
    merge_above: float | None = Field(None, ge=-1, le=1)

    @field_validator("methods", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("methods")
    @classmethod
    def _each_once(cls, value: list[Method]) -> list[Method]:
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _merges(self) -> "Repair":
        if self.merge_above is not None and "merge" not in self.methods:
            raise ValueError("merge_above is about merging: add merge to methods, or leave it out")
        return self
