"""The `bench` section of a recipe."""

from pydantic import Field

from raylp.config import Section


class Bench(Section):
    """Requests of `output_tokens` tokens each, `concurrency` at a time, the models in turn, `repeats` times."""

    models: list[str] = ["baseline", "healed"]
    concurrency: list[int] = [1, 8]
    requests: int = Field(16, ge=1)
    output_tokens: int = Field(32, ge=2)
    warmup: int = Field(4, ge=0)
    repeats: int = Field(2, ge=1)
