"""The vLLM worker of endpoint and teacher on the CPU. Imported by vLLM alone, which finds it by name (`worker_cls`)."""

from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker

from raylp.generate.vllm_engine import request_amx


class CPUWorker(_CPUWorker):
    """vLLM's own, with the right to use the processor's matrix unit, and the vocabulary packed for products once."""

    def init_device(self) -> None:
        request_amx()
        super().init_device()

    def load_model(self, **options: Any) -> None:
        """vLLM packs the input embedding too, which only a model without an output layer of its own multiplies by."""
        super().load_model(**options)
        modules = list(self.get_model().modules())
        if any(isinstance(module, ParallelLMHead) for module in modules):
            for module in modules:
                if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
                    vars(module).pop("cpu_linear", None)
