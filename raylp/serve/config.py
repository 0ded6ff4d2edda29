"""The `serve` section of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from raylp.config import Section
from raylp.errors import UserError
from raylp.serve.slo import read_objective

INGRESS_CPUS = 0.5  # of the process before the engines, of which there is one


class Serve(Section):
    """`models`: names of models of the run, or all of them. The endpoint listens on `host`:`port` (0: any free one).

    `replicas`: of each model at least, `max_replicas`: at most, when more than `target_ongoing_requests` come at once.
    `cpus`: logical CPUs of a replica; on a CPU its engine has at least so many threads, and all cores if it is the
    only replica of its model. `gpus`: GPUs of one (auto: one, or an equal share when there are fewer; none on a
    cluster without). `dtype`: of weights (auto: bfloat16, on GPUs what `model.dtype` names, and float32
    on a CPU that does not multiply bfloat16 itself).
    `tensor_parallel`: GPUs that one engine's weights are spread over.
    `max_model_len`: the most tokens of a prompt and its answer. `ready_timeout_s`: how long a start may take;
    `drain_s`: how long a shutdown waits for requests at work.
    `max_waiting`: requests at work at a time, each sentence of one counted, more are told to come again;
    `max_body_bytes` of a request; `max_sentences` of a request to /translate. `api_keys`: a file with one key a line,
    of which each request must send one. `slo`: such as p90=300ms; requests to the model `auto` are answered by the one
    with the most layers that meets it under the present load.
    """

    models: list[str] | None = Field(None, min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: int = Field(32, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float | Literal["auto"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(1024, ge=16)
    tensor_parallel: int = Field(1, ge=1)
    ready_timeout_s: float = Field(600, gt=0)
    drain_s: float = Field(30, ge=0)
    max_waiting: int = Field(1024, ge=1)
    max_body_bytes: int = Field(2**20, ge=1024)
    max_sentences: int = Field(256, ge=1)
    api_keys: str | None = None
    slo: str | None = None

    def num_cpus(self, models: int) -> float:
        """Logical CPUs of an endpoint with so many models."""
        return models * self.replicas * self.cpus + INGRESS_CPUS

    @model_validator(mode="after")
    def _limits(self) -> "Serve":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, less than replicas, which is {self.replicas}")
        if self.gpus != "auto" and self.gpus < 0:
            raise ValueError("gpus: a number of GPUs, or auto")
        if self.slo is not None:
            try:
                read_objective(self.slo)
            except UserError as error:
                raise ValueError(str(error)) from error
        return self
