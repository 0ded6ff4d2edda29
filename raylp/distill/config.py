"""The `distill` section of a recipe."""

from typing import Literal

from pydantic import Field

from raylp.config import Section


class Filters(Section):
    """Limits a row must keep to; what fails one is kept in the parquet file with the reason."""

    max_words: int = Field(200, ge=1)
    min_characters: int = Field(2, ge=1)
    max_length_ratio: float = Field(2.5, gt=1)
    max_similarity_to_source: float = Field(0.9, gt=0)
    min_chrf_to_reference: float = Field(0.0, ge=0, le=100)


class Distill(Section):
    """`teacher`: `base` (the unpruned model) or a model's name; `limit`: the most training sources to translate."""

    teacher: str = "base"
    limit: int | None = Field(None, ge=1)
    engines: int = Field(1, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(32, ge=1)
    filters: Filters = Filters()
