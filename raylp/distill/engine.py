"""The teacher at work: Ray Data with vLLM, or with an endpoint elsewhere. Batches come back as they are done."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raylp import cluster
from raylp.data.tokens import Top
from raylp.distill.config import Distill
from raylp.distill.parts import Said
from raylp.generate.base import Request, StopRule
from raylp.generate.vllm_engine import CPU_SEQUENCES, CPU_WORKER, cpu_environment, cpu_options, engine_options

MAX_RESTARTS = 8  # of an engine's process, after which the command ends, and goes on when it is called again
LIGHT = 0.1  # CPUs of Ray Data's small stages; whole ones could starve the engines
# Rows an engine is given at a time. It must stay full (vLLM computes up to 1,024 at once on a large GPU) while a few
# long rows keep their batches waiting: twice what it computes lost a tenth of the time. More would be lost in a crash.
ON_GPU, ON_CPU = 2048, 4 * CPU_SEQUENCES
RETRIES, RETRY_S, TIMEOUT_S = 5, 1.0, 600.0
RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
OF_THE_ROW = frozenset({400, 413, 422})  # what a server refuses because of the text; all else is the server's state


def say(
    config: Distill,
    teacher: Path,
    dtype: str,
    batches: Iterable[Sequence[tuple[int, Request]]],
    rule: StopRule,
    max_model_len: int,
    gpus: int,
) -> Iterator[list[Said]]:
    """What an engine here says to (number, request) batches, in any order of them.

    Prompts wait in Ray's object store, which spills to disk, so memory does not grow with their number.
    """
    import ray
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from raylp.distill.whole_answers import WholeAnswers

    stop = sorted(rule.stop)
    heat, top_k, samples = config.heat, config.top_k, config.samples
    logprobs = top_k if top_k is not None else (0 if samples > 1 and config.by == "likelihood" else None)

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        params = {"temperature": heat, "max_tokens": int(row["max_tokens"]), "stop_token_ids": stop}
        if heat > 0:
            params["seed"] = int(row["index"])  # the same again after a crash
        if logprobs is not None:
            params["logprobs"] = logprobs
        # The end tokens are among the stops; the text is made here from the tokens, as with every other backend.
        return {"sampling_params": {**params, "ignore_eos": True, "detokenize": False}}

    # One process for each of the small stages is enough, and on a small machine every process counts.
    light = {"num_cpus": LIGHT, "compute": ray.data.TaskPoolStrategy(size=1)}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(teacher),
            engine_kwargs=_options(config, teacher, dtype, max_model_len, gpus),
            concurrency=(config.engines, config.engines),
            batch_size=config.batch_size,
            max_concurrent_batches=max(2, math.ceil((ON_GPU if gpus else ON_CPU) / config.batch_size)),
            placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}},
            runtime_env={"env_vars": _environment(config, gpus)},
            should_continue_on_error=True,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
        ),
        preprocess=ask,
        preprocess_map_kwargs=light,
        postprocess_map_kwargs=light,
    )
    stage = processor.get_stage_by_name("vLLMEngineStage")
    vars(stage)["fn"] = WholeAnswers  # assigned to, a stage works its resources out anew, and then asks for a GPU
    # An engine that dies every time would otherwise be started for ever.
    stage.map_batches_kwargs["max_restarts"] = MAX_RESTARTS
    # A block is a batch is a part. Rows that failed would skip a postprocess function and keep all columns: none is
    # given, so all rows of a block are alike.
    rows = processor(ray.data.from_arrow_refs([ray.put(_table(batch)) for batch in batches]))
    columns = ["index", "generated_tokens", "__inference_error__", *(["logprobs"] if logprobs is not None else [])]
    for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        there = [column for column in columns if column in block.column_names]
        yield [_said(row, top_k) for row in block.select(there).to_pylist()]


def _table(batch: Sequence[tuple[int, Request]]) -> Any:
    import pyarrow

    return pyarrow.table(
        {
            "index": pyarrow.array([index for index, _ in batch], pyarrow.int64()),
            "tokenized_prompt": pyarrow.array([r.tokens for _, r in batch], pyarrow.list_(pyarrow.int32())),
            "max_tokens": pyarrow.array([r.max_new_tokens for _, r in batch], pyarrow.int64()),
        }
    )


def _said(row: dict[str, Any], top_k: int | None) -> Said:
    tokens = tuple(int(token) for token in row["generated_tokens"] or ())
    if row["__inference_error__"]:
        return Said(row["index"], error=" ".join(str(row["__inference_error__"]).split()))
    places = row.get("logprobs")
    if places is None or not len(tokens):
        return Said(row["index"], tokens)
    each = [{int(token): float(told["logprob"]) for token, told in place.items()} for place in places]
    own = sum(place[token] for token, place in zip(tokens, each, strict=True))
    return Said(row["index"], tokens, logprob=own, top=_top(each, top_k) if top_k is not None else None)


def _top(places: Sequence[dict[int, float]], k: int) -> Top:
    """vLLM gives the chosen token too where it is not among the first k."""
    best = [sorted(place.items(), key=lambda item: (-item[1], item[0]))[:k] for place in places]
    ids = np.array([[token for token, _ in row] for row in best], np.int32)
    return Top(ids, np.array([[value for _, value in row] for row in best], np.float16))


def _options(config: Distill, teacher: Path, dtype: str, max_model_len: int, gpus: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        **engine_options(teacher),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "generation_config": "vllm",  # the checkpoint's own sampling settings are not wanted
        "seed": 0,
        "disable_log_stats": True,  # which are counted for every token, and nobody reads
        "tensor_parallel_size": config.gpus_per_engine if gpus else 1,
    }
    if config.top_k is not None:
        options["max_logprobs"] = config.top_k
    if not gpus:
        options |= {**cpu_options(teacher, dtype, max_model_len, CPU_SEQUENCES), "worker_cls": CPU_WORKER}
    return options


def _environment(config: Distill, gpus: int) -> dict[str, str]:
    """Ray gives an actor with one CPU one thread; an engine on the CPU may have all the cores that are its share."""
    env = {**cluster.worker_env(), "VLLM_LOGGING_LEVEL": "WARNING"}
    return env if gpus else {**env, **cpu_environment(max(1, cluster.cores() // config.engines))}


# --- an endpoint ---


class Asker:
    """Asks an OpenAI-compatible server, a batch's rows at once; tries again what may pass.

    What the server refuses of a row is that row's error; where it does not answer, nothing is kept.
    """

    def __init__(self, url: str, model: str, key: str, heat: float, stop: Sequence[str]) -> None:
        self.url = f"{url.rstrip('/')}/completions"
        self.options = {"model": model, "temperature": heat, "stop": list(stop)}
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __call__(self, batch: dict[str, Any]) -> Any:
        """`batch`: columns `index`, `prompt`, `max_tokens`; yields `index`, `text`, `finish`, `error`."""
        import asyncio

        import httpx

        async with httpx.AsyncClient(timeout=TIMEOUT_S, headers=self.headers) as client:
            rows = zip(batch["index"], batch["prompt"], batch["max_tokens"], strict=True)
            found = await asyncio.gather(*(self._ask(client, *row) for row in rows))
        yield {name: [row[name] for row in found] for name in ("index", "text", "finish", "error")}

    async def _ask(self, client: Any, index: Any, prompt: Any, most: Any) -> dict[str, Any]:
        import asyncio

        import httpx

        asked = {**self.options, "prompt": str(prompt), "max_tokens": int(most), "seed": int(index)}
        problem = ""
        for turn in range(RETRIES):
            if turn:
                await asyncio.sleep(RETRY_S * 2 ** (turn - 1))
            try:
                answer = await client.post(self.url, json=asked)
                if answer.status_code == 200:
                    choice = answer.json()["choices"][0]
                    text, finish = choice["text"], choice.get("finish_reason") or "stop"
                    return {"index": int(index), "text": text, "finish": finish, "error": ""}
                problem = " ".join(f"HTTP {answer.status_code}: {answer.text[:200]}".split())
                if answer.status_code in OF_THE_ROW:
                    return {"index": int(index), "text": "", "finish": "error", "error": problem}
                if answer.status_code not in RETRIED:
                    break
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"{self.url} gives no translations: {problem}")


def ask_endpoint(
    config: Distill, batches: Iterable[Sequence[tuple[int, str, int]]], stop: Sequence[str]
) -> Iterator[list[Said]]:
    """What a server elsewhere says to batches of (number, prompt, most tokens), in any order of them."""
    import pyarrow
    import ray
    import ray.data

    def table(batch: Sequence[tuple[int, str, int]]) -> Any:
        index, prompt, most = zip(*batch, strict=True)
        return pyarrow.table({"index": list(index), "prompt": list(prompt), "max_tokens": list(most)})

    assert config.endpoint is not None
    given = (config.endpoint, config.teacher, os.environ.get("OPENAI_API_KEY", ""), config.heat, stop)
    rows = ray.data.from_arrow_refs([ray.put(table(batch)) for batch in batches]).map_batches(
        Asker, fn_constructor_args=given, batch_size=None, num_cpus=LIGHT, concurrency=config.engines
    )
    for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield [Said(**{k: v for k, v in row.items() if v or k == "index"}) for row in block.to_pylist()]
