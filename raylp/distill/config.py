"""The `distill` section of a recipe."""

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raylp.config import Section
from raylp.metrics.registry import full_name, is_comet

Off = Literal[False]
LIMITS = (
    "max_words",
    "max_length_ratio",
    "min_characters",
    "language",
    "max_similarity_to_source",
    "max_similarity_to_held_out",
    "min_chrf_to_reference",
    "min_embedding_similarity",
    "min_comet",
)
ZERO_MEANS_SOMETHING = ("min_chrf_to_reference", "min_embedding_similarity", "min_comet")


class Filters(Section):
    """Limits a row must keep to, in this order; `false` turns one off. What fails one keeps it as its reason.

    `duplicates`: the same source and translation again. `empty`, `newlines`, `control_characters` (and replacement
    characters), `loops` (repetition), `cut_off` (ended by the bound). `max_words`, `min_characters`: of translations.
    `max_length_ratio`: characters of the translation to those expected of it, or the other way round; expected is the
    source's length times what is usual between source and reference in the language pair. `language`: least probability
    of the pair's language, on both sides, of texts of at least 30 characters. `max_similarity_to_source`: share of
    characters a translation may have in common with its source, unless the reference has as many.
    `max_similarity_to_held_out`: the same of source or translation with any sentence of search, dev and test.
    `min_chrf_to_reference`: chrF2++ of the sentence. `min_embedding_similarity`, `embedding_model`: cosine of source
    and translation by a sentence-transformers model, which must be installed and may be fetched; off unless asked for.
    `min_comet`, `comet`: of a COMET checkpoint, which may be fetched; off unless asked for.
    """

    duplicates: bool = True
    empty: bool = True
    newlines: bool = True
    control_characters: bool = True
    loops: bool = True
    cut_off: bool = True
    max_words: Annotated[int, Field(ge=1)] | Off = 200
    max_length_ratio: Annotated[float, Field(gt=1)] | Off = 2.5
    min_characters: Annotated[int, Field(ge=1)] | Off = 2
    language: Annotated[float, Field(gt=0, le=1)] | Off = 0.1
    max_similarity_to_source: Annotated[float, Field(gt=0, le=1)] | Off = 0.9
    max_similarity_to_held_out: Annotated[float, Field(gt=0, le=1)] | Off = 0.9
    min_chrf_to_reference: Annotated[float, Field(ge=0, le=100)] | Off = False
    min_embedding_similarity: Annotated[float, Field(ge=-1, le=1)] | Off = False
    embedding_model: str = "sentence-transformers/LaBSE"
    min_comet: float | Off = False
    comet: str = "Unbabel/wmt22-cometkiwi-da"

    @field_validator("comet")
    @classmethod
    def _known(cls, comet: str) -> str:
        name = full_name(comet)
        if not is_comet(name):
            raise ValueError("a COMET checkpoint is wanted, such as wmt22-cometkiwi-da")
        return name

    @field_validator(*LIMITS, mode="before")
    @classmethod
    def _zero_is_a_limit(cls, value: object, info: ValidationInfo) -> object:
        """Only `false` turns a limit off, though Python takes 0 for it."""
        if isinstance(value, bool):
            return value
        if not isinstance(value, int | float) or (value == 0 and info.field_name not in ZERO_MEANS_SOMETHING):
            raise ValueError("give a number above 0, or false to turn it off")
        return float(value)


# What may change while a distill is interrupted: where and in what portions texts are translated, not what is asked.
FREE = ("engines", "gpus_per_engine", "batch_size")


class Distill(Section):
    """`teacher`: `base` (the unpruned model) or a model's name; `endpoint`: the URL of an OpenAI-compatible server
    (`/v1` included) that has the model `teacher` (its key: $OPENAI_API_KEY), instead of an engine here.

    `sources`: the sources of the `train` split, or the `mono` text of the corpora. `limit`: the most of them.
    `samples`: translations of each source, of which the best is kept `by`: `chrF++` against the reference, a COMET
    checkpoint, or `likelihood` (the teacher's own, a token); `temperature`: 0 for one sample and 0.7 for several.
    `top_k`: so many of the teacher's probabilities are kept for every token, to learn from.
    `batch_size`: sentences that are saved together; what was not is translated again after a crash. `dtype`: of the
    teacher in vLLM (auto: bfloat16, or float32 on a CPU of this machine that does not multiply bfloat16 itself).
    `gpus_per_engine`: tensor parallelism, for a teacher too large for one GPU. `max_model_len`: the most tokens of a
    prompt and its translation together, as far as the teacher can; a longer row is recorded as failed.
    """

    teacher: str = "base"
    endpoint: str | None = None
    sources: Literal["train", "mono"] = "train"
    limit: int | None = Field(None, ge=1)
    samples: int = Field(1, ge=1, le=64)
    temperature: float | None = Field(None, ge=0)
    by: str = "chrF2++"
    top_k: int | None = Field(None, ge=2, le=256)
    engines: int = Field(1, ge=1)
    gpus_per_engine: int = Field(1, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(4096, ge=16)
    batch_size: int = Field(32, ge=1)
    filters: Filters = Filters()

    @field_validator("by")
    @classmethod
    def _known(cls, by: str) -> str:
        name = by if by == "likelihood" else full_name(by)
        if name != "likelihood" and name != "chrF2++" and not is_comet(name):
            raise ValueError("samples are chosen by chrF++, a COMET checkpoint, or likelihood")
        return name

    @property
    def comets(self) -> list[str]:
        """The COMET checkpoints that are needed."""
        by = [self.by] if self.samples > 1 and self.by != "likelihood" and is_comet(self.by) else []
        return [*by, *([self.filters.comet] if self.filters.min_comet is not False else [])]

    @property
    def is_another(self) -> bool:
        """Whether the teacher is a model of its own that an engine here runs."""
        return self.teacher != "base" and self.endpoint is None

    @property
    def num_cpus(self) -> int:
        """Logical CPUs it asks for: one for each engine, and one between Ray Data's other stages."""
        return self.engines + 1

    @property
    def heat(self) -> float:
        """The temperature."""
        return self.temperature if self.temperature is not None else (0.0 if self.samples == 1 else 0.7)

    @model_validator(mode="after")
    def _fits(self) -> "Distill":
        if self.samples > 1 and self.heat == 0:
            raise ValueError(f"{self.samples} samples at temperature 0 are all the same: give a temperature")
        if self.samples > 1 and self.sources == "mono" and self.by == "chrF2++":
            raise ValueError("monolingual text has no references for chrF++: choose by likelihood")
        if self.filters.min_chrf_to_reference is not False and self.sources == "mono":
            raise ValueError("monolingual text has no references for min_chrf_to_reference: leave it out")
        if not self.teacher:
            raise ValueError("teacher: base, or a model's name")
        if self.endpoint is not None and not re.match(r"https?://[^/]", self.endpoint):
            raise ValueError(f"endpoint {self.endpoint!r}: write a URL such as http://127.0.0.1:8000/v1")
        if self.endpoint is not None and self.teacher == "base":
            raise ValueError("an endpoint needs the name of its model: teacher: NAME")
        if self.endpoint is not None and self.top_k is not None:
            raise ValueError("top_k needs the teacher's tokens, which an endpoint does not give")
        if self.endpoint is not None and self.by == "likelihood" and self.samples > 1:
            raise ValueError("likelihood needs the teacher's tokens, which an endpoint does not give")
        return self
