"""The `bench` section of a recipe."""

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylp.bench.load import Load
from raylp.config import Section

Metric = Literal["output_tokens_per_s", "requests_per_s", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"]


ENOUGH_REPEATS = 5
RESIDENT_CPUS = 0.5  # that a model held for batches claims of the cluster: they take turns, each with all cores


class Bench(Section):
    """Load on the endpoint: for each number in `concurrency`, so many clients that each send request after request; for
    each in `rates`, so many requests a second that come at random moments. For each in `batches`, so many sentences at
    once are given to an engine of each of `backends` itself.

    `models`: names of models of the run (`healed` and `pruned`: the run's own of the kind), measured in turn, `repeats`
    times; by default the baseline, the healed or else pruned model, and what either was quantised to. Of fewer than
    five repeats nothing is concluded. A measurement is `requests` requests, or two for each client if that is more;
    before all, `warmup` go to each model, and a batch of each size to each engine.
    `output_tokens`: of every answer; null: as many as the translation has.
    `metric`: by which models are compared, chosen before measuring; `goodput`: the most ms of `ttft_ms`, `tpot_ms`
    or `e2e_ms` for a request to count as good.
    """

    models: list[str] | None = Field(None, min_length=1)
    concurrency: list[int] = [1, 8]
    rates: list[float] = []
    batches: list[int] = []
    backends: list[Literal["vllm", "transformers"]] = Field(["vllm"], min_length=1)
    requests: int = Field(8, ge=1)
    output_tokens: int | None = Field(32, ge=2)
    warmup: int = Field(4, ge=1)
    repeats: int = Field(5, ge=2)
    metric: Metric = "output_tokens_per_s"
    goodput: dict[Literal["ttft_ms", "tpot_ms", "e2e_ms"], float] = {}

    @property
    def loads(self) -> list[Load]:
        """All that are measured."""
        closed = [Load("closed", clients) for clients in self.concurrency]
        batches = [Load("batch", size, backend) for backend in self.backends for size in self.batches]
        return [*closed, *(Load("open", rate) for rate in self.rates), *batches]

    @property
    def largest_batch(self) -> int:
        """Sentences that an engine computes at a time."""
        return max(self.batches, default=0)

    def num_requests(self, load: Load) -> int:
        """Requests of one measurement; all clients are busy for most of it, and every batch is full."""
        if load.kind == "batch":
            return math.ceil(self.requests / load.value) * int(load.value)
        return max(self.requests, 2 * int(load.value)) if load.kind == "closed" else self.requests

    @field_validator("concurrency", "batches")
    @classmethod
    def _clients(cls, value: list[int]) -> list[int]:
        if min(value, default=1) < 1 or len(set(value)) < len(value):
            raise ValueError("numbers, each at least 1 and none twice")
        return value

    @field_validator("rates")
    @classmethod
    def _rates(cls, value: list[float]) -> list[float]:
        if min(value, default=1) <= 0 or len(set(value)) < len(value):
            raise ValueError("requests a second, each more than 0 and none twice")
        return value

    @model_validator(mode="after")
    def _something(self) -> "Bench":
        if not self.loads:
            raise ValueError("no load: give concurrency, rates or batches")
        if any(ms <= 0 for ms in self.goodput.values()):
            raise ValueError("goodput: times in ms, each more than 0")
        return self
