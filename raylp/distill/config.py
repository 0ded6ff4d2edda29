"""The `distill` section of a recipe."""

from typing import Literal

from pydantic import Field

from raylp.config import Section


class Filters(Section):
    """Limits a row must keep to; what fails one is kept in the parquet file with the reason.

    `max_length_ratio`: characters of the translation to those expected of it, or the other way round; expected is the
    source's length times what is usual between source and reference in the language pair.
    `max_similarity_to_source`: share of characters a translation may have in common with its source, unless the
    reference has as many. `min_chrf_to_reference`: chrF2++ of the sentence.
    """

    max_words: int = Field(200, ge=1)
    min_characters: int = Field(2, ge=1)
    max_length_ratio: float = Field(2.5, gt=1)
    max_similarity_to_source: float = Field(0.9, gt=0)
    min_chrf_to_reference: float = Field(0.0, ge=0, le=100)


class Distill(Section):
    """`teacher`: `base` (the unpruned model) or a model's name; `limit`: the most training sources to translate.

    `batch_size`: sentences that are saved together; what was not is translated again after a crash. `dtype`: of the
    teacher in vLLM (auto: bfloat16). `gpus_per_engine`: tensor parallelism, for a teacher too large for one GPU.
    """

    teacher: str = "base"
    limit: int | None = Field(None, ge=1)
    engines: int = Field(1, ge=1)
    gpus_per_engine: int = Field(1, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(32, ge=1)
    filters: Filters = Filters()
