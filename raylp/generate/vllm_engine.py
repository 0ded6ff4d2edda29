"""Greedy generation by a vLLM engine in this process, with any layers left out when asked for.

The engine runs in the process that makes it (a Ray actor, mostly): it starts in half the time, and no engine process
can outlive its owner, however that ends.
"""

import gc
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.generate.base import VLLM_LENGTH, Asked, Output, Request, stop_rule, to_output
from raylp.models.load import (
    BYTES_PER_WEIGHT,
    kv_per_token,
    load_tokenizer,
    max_positions,
    read_config,
    read_generation_config,
)
from raylp.models.view import check_removed
from raylp.quantize.engines import check_cpu, engine_of, quantization

_EXTENSION = "raylp.generate.layer_skip.LayerSkip"
CPU_WORKER = "raylp.generate.vllm_worker.CPUWorker"
# On a CPU vLLM otherwise gives the model a process of its own, for which the engine's waits without sleeping: a core
# less and a gigabyte more. It does so to set OMP's variables, which are set here before a process starts.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# oneDNN keeps the kernels it has made, one for each number of tokens in each product, nearly a megabyte each, and of
# its own accord 1,024 of them. An engine needs those of the last few steps.
FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
GPU_MEMORY = 0.85  # share of a GPU's memory that an engine takes
CPU_SEQUENCES = 64
CPU_BLOCK = 128  # tokens of a block of vLLM's cache on a CPU
_OTHER_BACKEND = "; or use backend transformers"


class VLLMGenerator:
    """See `raylp.generate.base.Generator`. One at a time in a process.

    `path`: a checkpoint; `dtype`: `float32`, `bfloat16` or `float16`; `newline`: whether a newline ends a translation.
    `max_model_len`: the most tokens of a prompt and its translation together, lowered to what the model can.
    `skippable`: whether `generate` may be given layers to leave out. Such an engine is not compiled, so it is slower.
    `gpu_memory_utilization`: share of a GPU's memory to take; for a CPU see `kv_cache_bytes`. `at_once`: the most
    requests that it computes at a time (default: vLLM's own on a GPU, `CPU_SEQUENCES` on a CPU).

    Raises:
        UserError: vLLM cannot load the model, or cannot skip its layers.
    """

    backend = "vllm"

    def __init__(
        self,
        path: Path,
        dtype: str,
        newline: bool = True,
        max_model_len: int = VLLM_LENGTH,
        skippable: bool = False,
        gpu_memory_utilization: float = GPU_MEMORY,
        at_once: int | None = None,
    ) -> None:
        import torch

        self.dtype = dtype
        self.newline = newline
        self.tokenizer = load_tokenizer(path)
        config = read_config(path).get_text_config(decoder=True)
        self.num_layers = config.num_hidden_layers
        self.max_model_len = min(max_model_len, max_positions(path) or max_model_len)
        self.rule = stop_rule(self.tokenizer, [config, read_generation_config(path)], newline)
        self._skippable = skippable
        self._instead = "" if engine_of(path) else _OTHER_BACKEND
        self._removed: list[int] = []
        self._count = 0
        options: dict[str, Any] = {**engine_options(path)}
        if skippable:
            options |= {"worker_extension_cls": _EXTENSION, "enforce_eager": True}
        if at_once is not None:
            options["max_num_seqs"] = at_once
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            request_amx()
            options |= cpu_options(path, dtype, self.max_model_len, at_once or CPU_SEQUENCES)
        with _in_this_process():
            from vllm import LLM

            try:
                self._llm = LLM(
                    str(path),
                    dtype=dtype,
                    max_model_len=self.max_model_len,
                    generation_config="vllm",
                    gpu_memory_utilization=gpu_memory_utilization,
                    distributed_executor_backend="uni",
                    seed=0,
                    **options,
                )
            except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
                raise UserError(f"model {path}: vLLM cannot load it: {_cause(error)}{self._instead}") from error
        if skippable:
            self._call("raylp_watch_layers")
            self._run([Request((self.tokenizer.eos_token_id or 0,), 1)])
            self._call("raylp_skip_layers", [])

    def generate(
        self,
        requests: Sequence[Request],
        removed: Sequence[int] = (),
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Output]:
        """Greedy continuations without the layers `removed`, one for each request and in their order.

        `drafts` are not used: the engine's own speculation knows no drafts from outside.

        Raises:
            UserError: a request is longer than `max_model_len`, or layers are to be left out of an engine that is not
                skippable.
        """
        longest = max((len(r.tokens) + r.max_new_tokens for r in requests), default=0)
        if longest > self.max_model_len:
            raise UserError(
                f"a prompt with its translation may take {longest} tokens, the engine holds {self.max_model_len}: "
                f"shorten the sentences or the prompt's examples{self._instead}"
            )
        self._leave_out(check_removed(removed, self.num_layers))
        rows = self._run(requests)
        return [to_output(self.tokenizer, tokens, finish, self.newline) for tokens, finish in map(self.rule.cut, rows)]

    def generate_together(self, asked: Sequence[Asked]) -> list[list[Output]]:
        """What `generate` gives for each of `asked`; those of one view go through the engine at once."""
        made: dict[int, list[Output]] = {}
        for view in dict.fromkeys(frozenset(removed) for _, removed, _ in asked):
            own = [i for i, (_, removed, _) in enumerate(asked) if frozenset(removed) == view]
            every = iter(self.generate([request for i in own for request in asked[i][0]], sorted(view)))
            made |= {i: [next(every) for _ in asked[i][0]] for i in own}
        return [made[i] for i in range(len(asked))]

    def forget(self) -> None:
        """Lets go of the cached keys and values of earlier prompts' beginnings."""
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        """Gives back the engine's memory; the generator is of no use afterwards."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()

    def _leave_out(self, removed: list[int]) -> None:
        if sorted(removed) == self._removed:
            return
        if not self._skippable:
            raise UserError("this vLLM engine was not started to leave layers out: start it with skippable=True")
        self._call("raylp_skip_layers", removed)
        # Cached keys and values of a prompt's beginning were made by other layers.
        self._llm.reset_prefix_cache()
        self._removed = sorted(removed)

    def _call(self, method: str, *args: Any) -> None:
        (problem,) = self._llm.collective_rpc(method, args=args)
        if problem:
            raise UserError(f"vLLM cannot leave layers out of this model: {problem}{_OTHER_BACKEND}")

    def _run(self, requests: Sequence[Request]) -> list[list[int]]:
        """Tokens of each request, up to a stop token, its bound, or a few past the point where it repeats itself."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        rows: dict[str, list[int]] = {}
        for request in requests:
            self._count += 1
            params = SamplingParams(
                temperature=0,
                max_tokens=request.max_new_tokens,
                stop_token_ids=sorted(self.rule.stop),
                ignore_eos=True,  # the end tokens are among the stops
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            key = str(self._count)
            rows[key] = []
            engine.add_request(key, {"prompt_token_ids": list(request.tokens)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                key = output.request_id
                rows[key] += output.outputs[0].token_ids
                if not output.finished and self.rule.finished(rows[key]):
                    engine.abort_request([key])
        return list(rows.values())


def _cause(error: Exception) -> str:
    if "failed to be inspected" in str(error) and importlib.util.find_spec("torchvision") is None:
        return "it is of a kind that also sees images, and vLLM needs torchvision for it, which is not installed"
    return str(error)


def engine_options(path: Path) -> dict[str, str]:
    """What vLLM is told of the checkpoint in `path`: to read transformers' files, and how to quantise the weights.

    Left to itself, vLLM prefers Mistral's own format where a directory has both.
    """
    return {"config_format": "hf", "tokenizer_mode": "hf", "load_format": "safetensors", **quantization(path)}


def cpu_environment(threads: int) -> dict[str, str]:
    """What the processes of an engine on a CPU are started with, where it has processes of its own."""
    return {**ONE_PROCESS, **FEW_KERNELS, "OMP_NUM_THREADS": str(threads)}


def cpu_options(path: Path, dtype: str, max_model_len: int, max_num_seqs: int) -> dict[str, Any]:
    """What an engine on a CPU is told besides; memory is set aside for the logits of `max_num_seqs` too.

    Raises:
        UserError: this CPU cannot compute what the checkpoint is quantised as.
    """
    check_cpu(path)
    return {
        "enforce_eager": True,  # compiling takes minutes on a small CPU, and gains little there
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": kv_cache_bytes(path, dtype, max_model_len, max_num_seqs),
    }


def kv_cache_bytes(path: Path, dtype: str, max_model_len: int, max_num_seqs: int) -> int:
    """Memory an engine on a CPU sets aside for keys and values: of all sequences at their full length.

    At most 1 GiB, but enough for one of them. Where $VLLM_CPU_KVCACHE_SPACE (GiB) is set, vLLM takes that instead.

    Raises:
        UserError: that variable is not a whole number.
    """
    if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        if not space.isdigit():
            raise UserError(f"VLLM_CPU_KVCACHE_SPACE={space}: a whole number of GiB is wanted, or nothing")
        return int(space) * 2**30
    # Memory is given out in blocks, and layers of several kinds are not always of equal number.
    tokens = (max_model_len // CPU_BLOCK + 2) * CPU_BLOCK
    one = kv_per_token(read_config(path).get_text_config(decoder=True)) * BYTES_PER_WEIGHT[dtype] * tokens
    return max(one, min(2**30, max(2**27, one * max_num_seqs)))


def request_amx() -> None:
    """Asks the kernel for the right to use a CPU's matrix unit (AMX), where it has one.

    Linux grants it to a process that asks. vLLM's bfloat16 attention on such a CPU uses the unit without asking, and
    dies of an illegal instruction unless some other library happened to ask before.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


@contextmanager
def _in_this_process() -> Iterator[None]:
    """vLLM's settings for an engine without processes of its own, quiet on stdout.

    On a CPU, vLLM replaces `torch.set_num_threads` by nothing; it is put back.
    """
    import torch

    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **FEW_KERNELS,
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    before = {key: os.environ.get(key) for key in ONE_PROCESS}
    set_num_threads = torch.set_num_threads
    os.environ.update(ONE_PROCESS)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        for key, old in before.items():
            if old is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = old
