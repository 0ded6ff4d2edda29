"""The `serve` section of a recipe."""

from typing import Literal

from pydantic import Field

from raylp.config import Section


class Serve(Section):
    """`models`: names under `models/` of the run, or all of them. The endpoint listens on `host`:`port`.

    `cpus`: logical CPUs of a replica, `gpus`: GPUs of one; `ready_timeout_s`: how long a start may take.
    """

    models: list[str] | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1)
    target_ongoing_requests: int = Field(32, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(1024, ge=16)
    ready_timeout_s: float = Field(600, gt=0)
