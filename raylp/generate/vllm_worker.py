"""The vLLM worker of an endpoint on the CPU. Imported by vLLM alone, which finds it by name (`worker_cls`)."""

from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker

from raylp.generate.vllm_engine import request_amx


class CPUWorker(_CPUWorker):
    """vLLM's own, with the right to use the processor's matrix unit."""

    def init_device(self) -> None:
        request_amx()
        super().init_device()
