"""The `bench` section of a recipe."""

from pydantic import Field, field_validator

from raylp.config import Section


class Bench(Section):
    """Load on the endpoint: for each number in `concurrency`, so many clients that each send request after request.

    `models`: names of models of the run (`healed` and `pruned`: the run's own of the kind), measured in turn, `repeats`
    times. A measurement is `requests` requests of `output_tokens` tokens each, or two for each client if that is more;
    before all, `warmup` go to each model.
    """

    models: list[str] = Field(["baseline", "healed"], min_length=1)
    concurrency: list[int] = Field([1, 8], min_length=1)
    requests: int = Field(8, ge=1)
    output_tokens: int = Field(32, ge=2)
    warmup: int = Field(4, ge=1)
    repeats: int = Field(3, ge=2)

    def num_requests(self, clients: int) -> int:
        """Requests of one measurement with so many clients; all of them are busy for most of it."""
        return max(self.requests, 2 * clients)

    @field_validator("concurrency")
    @classmethod
    def _clients(cls, value: list[int]) -> list[int]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("numbers of clients, each at least 1 and none twice")
        return value
