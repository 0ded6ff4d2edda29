"""The stage that translates the training text with a teacher: Ray Data with vLLM, then filters.

Every translated batch is written at once, whole, to a file of its own; a start after a crash reads those files and asks
only for what they lack. Nothing depends on the order or the number of tries of Ray Data's tasks.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.context import Context
from raylp.data.corpus import Pair, write_jsonl
from raylp.data.splits import sentence_hash
from raylp.distill.config import Distill
from raylp.distill.filters import Row, counts, reasons
from raylp.errors import UserError
from raylp.generate.base import Output, Request, StopRule, stop_rule, to_output
from raylp.generate.vllm_engine import CPU_SEQUENCES, CPU_WORKER, cpu_options
from raylp.models.load import load_tokenizer, max_positions, read_config, read_generation_config
from raylp.models.source import fingerprint, locate
from raylp.progress import heartbeat

WORK = ".work/distill"
LIGHT = 0.1  # CPUs of Ray Data's small stages; whole ones could starve the engines


def distill(context: Context) -> dict[str, Any]:
    """Writes `distill/teacher.parquet` and `distill/summary.json`.

    Columns: id, pair, source, reference, translation, finish (`stop`, `length`, `loop`, `error`), tokens (generated),
    kept, reason (null where kept). One row for each training source, in their order.

    Raises:
        UserError: the recipe or the cluster is not fit for it, or the engine failed; what is translated is kept.
    """
    config = context.recipe.distill
    if config is None:
        raise UserError("the recipe has no distill section")
    pairs = context.splits.train[: config.limit]
    if not pairs:
        raise UserError("distill: no training pairs to translate; name data.<name>.train")
    teacher = context.baseline
    if config.teacher != "base":
        with context.reporter.task("teacher") as task, heartbeat(task):
            teacher = locate(config.teacher, tell=context.reporter.line)
    tokenizer = load_tokenizer(teacher)
    text_config = read_config(teacher).get_text_config(decoder=True)
    rule = stop_rule(tokenizer, [text_config, read_generation_config(teacher)], context.prompt.newline)
    requests = context.prompt.requests(tokenizer, [(pair.source, pair.pair) for pair in pairs])
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype

    began = time.monotonic()
    work = f"{WORK}/{_digest(teacher, dtype, requests)}"
    before = len(_read_parts(context, work))
    if before < len(pairs):
        _translate(context, config, work, teacher, dtype, requests, rule, max_positions(teacher))
    done = _read_parts(context, work)
    assert set(done) == set(range(len(pairs))), "every row is translated once"
    outputs = [_output(done[i], rule, tokenizer, context.prompt.newline) for i in range(len(pairs))]
    rows = [
        Row(pair.pair, pair.source, pair.target, output.text, output.finish)
        for pair, output in zip(pairs, outputs, strict=True)
    ]
    found = reasons(rows, _held_out(context), config.filters)
    summary = {
        "schema": 1,
        "teacher": str(config.teacher),
        "fingerprint": fingerprint(teacher),
        "rows": len(pairs),
        **counts(found),
        "tokens": sum(len(output.tokens) for output in outputs),
        "seconds": round(time.monotonic() - began, 1),
        "found_from_before": before,
        "engine": {"name": "vllm", "dtype": dtype, "engines": config.engines, "logs": cluster.session_logs()},
    }
    with context.rundir.building("distill") as target:
        _write_parquet(target / "teacher.parquet", pairs, rows, outputs, found)
        (target / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    context.rundir.remove(work)
    if not summary["kept"]:
        most = next((reason for reason in counts(found) if reason != "kept"), "")
        context.reporter.line(f"distill: every row was rejected, most as {most!r}: see distill/teacher.parquet")
    return summary


def _digest(teacher: Path, dtype: str, requests: Sequence[Request]) -> str:
    """What an interrupted run must share with the one that goes on with its translations; 12 hex digits."""
    digest = hashlib.sha256(f"{fingerprint(teacher)} {dtype}".encode())
    for request in requests:
        digest.update(repr(request).encode())
    return digest.hexdigest()[:12]


def _read_parts(context: Context, work: str) -> dict[int, dict[str, Any]]:
    """Rows that are done, by their number: {"index", "tokens", "error"}."""
    done: dict[int, dict[str, Any]] = {}
    for name in context.rundir.names(work):
        if not name.startswith("part-"):
            continue
        for line in context.rundir.read_text(f"{work}/{name}").splitlines():
            row = json.loads(line)
            assert row["index"] not in done, f"row {row['index']} was translated twice"
            done[row["index"]] = row
    return done


def _translate(
    context: Context,
    config: Distill,
    work: str,
    teacher: Path,
    dtype: str,
    requests: Sequence[Request],
    rule: StopRule,
    longest: int | None,
) -> None:
    """Translates what no part has yet; a part appears for every batch."""
    done = _read_parts(context, work)
    missing = [index for index in range(len(requests)) if index not in done]
    with context.reporter.task("distill", len(requests)) as task:
        task.update(len(done), "starting Ray")
        cluster.start(context.recipe.resources)
        gpus = _gpus(config)
        # One CPU for each engine, and one between Ray Data's other stages.
        cluster.require(f"distill with {config.engines} engines", config.engines + 1, gpus)
        with heartbeat(task), _engine_logs(context) as log:
            task.beat("starting vLLM")
            try:
                for part in _run_engine(config, teacher, dtype, requests, missing, rule, longest, gpus):
                    name = f"{work}/part-{secrets.token_hex(8)}.jsonl"
                    context.rundir.write_text(name, write_jsonl(part))
                    task.advance(len(part), "")
            except UserError:
                raise
            except Exception as error:  # of many classes, the engine's own among them; all end here
                raise _failure(log, error) from error


def _run_engine(
    config: Distill,
    teacher: Path,
    dtype: str,
    requests: Sequence[Request],
    missing: Sequence[int],
    rule: StopRule,
    longest: int | None,
    gpus: int,
) -> Iterator[list[dict[str, Any]]]:
    """Translated batches as they are done, in any order: rows {"index", "tokens", "error"}."""
    import pyarrow
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    tables = []
    for start in range(0, len(missing), config.batch_size):
        batch = missing[start : start + config.batch_size]
        prompts = [list(requests[i].tokens) for i in batch]
        columns = {
            "index": pyarrow.array(batch, pyarrow.int64()),
            "tokenized_prompt": pyarrow.array(prompts, pyarrow.list_(pyarrow.int32())),
            "max_tokens": pyarrow.array([requests[i].max_new_tokens for i in batch], pyarrow.int64()),
        }
        tables.append(pyarrow.table(columns))
    stop = sorted(rule.stop)

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        params = {"temperature": 0.0, "max_tokens": int(row["max_tokens"]), "stop_token_ids": stop}
        # The end tokens are among the stops; the text is made here from the tokens, as with every other backend.
        return {"sampling_params": {**params, "ignore_eos": True, "detokenize": False}}

    # One process for each of the small stages is enough, and on a small machine every process counts.
    light = {"num_cpus": LIGHT, "compute": ray.data.TaskPoolStrategy(size=1)}
    needed = max(len(requests[i].tokens) + requests[i].max_new_tokens for i in missing)
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(teacher),
            engine_kwargs=_engine_options(config, teacher, dtype, min(needed, longest or needed), gpus),
            concurrency=(config.engines, config.engines),
            batch_size=config.batch_size,
            # A few batches overlap, so that the engine is never idle; on a CPU more would only be lost in a crash.
            max_concurrent_batches=8 if gpus else 2,
            placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}},
            runtime_env={"env_vars": _engine_environment(config, gpus)},
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
    # A block is a batch is a part. Rows that failed would skip a postprocess function and keep all columns: none is
    # given, so all rows of a block are alike.
    rows = processor(ray.data.from_arrow(tables))
    for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        wanted = block.select(["index", "generated_tokens", "__inference_error__"]).to_pylist()
        yield [
            {"index": row["index"], "tokens": list(row["generated_tokens"] or []), "error": row["__inference_error__"]}
            for row in wanted
        ]


def _engine_options(config: Distill, teacher: Path, dtype: str, max_model_len: int, gpus: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "generation_config": "vllm",  # the checkpoint's own sampling settings are not wanted
        "seed": 0,
        "tensor_parallel_size": config.gpus_per_engine if gpus else 1,
    }
    if not gpus:
        options |= {**cpu_options(teacher, dtype, max_model_len, CPU_SEQUENCES), "worker_cls": CPU_WORKER}
    return options


def _engine_environment(config: Distill, gpus: int) -> dict[str, str]:
    """Ray gives an actor with one CPU one thread; an engine on the CPU may have all the cores that are its share."""
    env = {**cluster.worker_env(), "VLLM_LOGGING_LEVEL": "WARNING"}
    return env if gpus else {**env, "OMP_NUM_THREADS": str(max(1, cluster.cores() // config.engines))}


def _gpus(config: Distill) -> int:
    """GPUs for all engines, where the cluster has any."""
    import ray

    return config.engines * config.gpus_per_engine if ray.cluster_resources().get("GPU", 0) else 0


def _output(row: dict[str, Any], rule: StopRule, tokenizer: Any, newline: bool) -> Output:
    """The text as every other backend gives it; for a row that failed, what went wrong."""
    if row["error"]:
        return Output(" ".join(row["error"].split()), (), "error")
    return to_output(tokenizer, *rule.cut(row["tokens"]), newline)


def _held_out(context: Context) -> set[tuple[str, str]]:
    """Sentences of the other splits, sources and targets."""
    splits = context.splits
    others = [*splits.search, *splits.dev, *(pair for pairs in splits.test.values() for pair in pairs)]
    return {(pair.pair, sentence_hash(text)) for pair in others for text in (pair.source, pair.target)}


def _write_parquet(
    path: Path, pairs: Sequence[Pair], rows: Sequence[Row], outputs: Sequence[Output], found: Sequence[str | None]
) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "id": [pair.id for pair in pairs],
        "pair": [pair.pair for pair in pairs],
        "source": [pair.source for pair in pairs],
        "reference": [pair.target for pair in pairs],
        "translation": [row.translation for row in rows],
        "finish": [row.finish for row in rows],
        "tokens": [len(output.tokens) for output in outputs],
        "kept": [reason is None for reason in found],
        "reason": pyarrow.array(found, pyarrow.string()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@contextmanager
def _engine_logs(context: Context) -> Iterator[Path]:
    """Ray Data's and vLLM's own messages go to `logs/distill.log` instead of the screen, bars are off."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import ray.data

    data_context = ray.data.DataContext.get_current()
    before = data_context.enable_progress_bars
    data_context.enable_progress_bars = False
    path = context.rundir.logs() / "distill.log"
    handler = logging.FileHandler(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data", "vllm")]
    saved = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield path
    finally:
        for logger, (handlers, propagate) in zip(loggers, saved, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
        data_context.enable_progress_bars = before


def _failure(log: Path, error: Exception) -> UserError:
    """The engine's own last line, what to do, and where the rest is."""
    text = str(error)
    with log.open("a") as stream:
        stream.write(f"{text}\nRay's own logs of the workers: {cluster.session_logs()}\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    advice = "run again to go on"
    if "memory" in text.lower():
        advice = "lower distill.engines, or raise $VLLM_CPU_KVCACHE_SPACE where it is the cache that is too small"
    return UserError(f"distill: the engine failed: {last}; {advice}; log: {log}", 1)
