"""What Ray Serve's replicas do before their engine starts. Imported by Ray alone, which finds it by name."""

from ray.llm._internal.common.callbacks.base import CallbackBase


class LocalCheckpoint(CallbackBase):
    """The checkpoint is a directory every node sees: nothing is fetched, which saves a process and its imports."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
