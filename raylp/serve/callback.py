"""What Ray Serve's replicas do before their engine starts. Imported by Ray alone, which finds it by name."""

from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_models import VLLMEngineConfig


class _OneProcess(VLLMEngineConfig):
    """Ray asks for a process for the model alone; see `raylp.generate.vllm_engine.ONE_PROCESS`."""

    def get_initialization_kwargs(self) -> dict[str, Any]:
        return {**super().get_initialization_kwargs(), "distributed_executor_backend": "uni"}


class Prepare(CallbackBase):
    """The checkpoint is a directory every node sees: nothing is fetched, which saves a process and its imports.

    On a CPU the engine's process computes too.
    """

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
        config = self.llm_config.get_engine_config()
        if config.accelerator_config is not None and config.accelerator_config.kind == "cpu":
            self.llm_config._engine_config = _OneProcess.model_validate(config.model_dump())
