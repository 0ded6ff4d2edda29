"""The stage that translates with a teacher: Ray Data with vLLM or an endpoint, then a choice, then filters.

Every translated batch is written at once, whole, to a file of its own; a start after a crash reads those files and asks
only for what they lack. Nothing depends on the order or the number of tries of Ray Data's tasks.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from raylp import cluster, machine
from raylp.config import changed
from raylp.context import Context
from raylp.data.corpus import Pair
from raylp.data.tokens import words_of
from raylp.distill.config import FREE, Distill
from raylp.distill.engine import ask_endpoint, say
from raylp.distill.filters import HeldOut, Judge, Row, usual_length_ratios
from raylp.distill.parts import Parts, Said
from raylp.distill.select import Rate, best, by_chrf, by_likelihood
from raylp.errors import UserError
from raylp.generate.base import Output, Request, StopRule, to_output
from raylp.generate.engine_log import error_lines
from raylp.generate.translate import read_stop_rule
from raylp.metrics.registry import check as check_metric
from raylp.metrics.registry import full_name, is_comet
from raylp.models.load import load_tokenizer, max_positions
from raylp.models.source import fingerprint, locate
from raylp.progress import heartbeat
from raylp.quantize.engines import identity
from raylp.recipe import Resources
from raylp.rundir import RunDir

WORK = ".work/distill"
SHARED = "distilled"  # in a cache: finished tables, by what they depend on
MESSAGE = 300  # characters of an engine's own words; its log has them all
LOG_LINES = 100  # of a worker that died, for distill's own log
CHUNK = 512  # rows that are chosen, judged and written at a time


@dataclass(frozen=True)
class Teacher:
    """`tokenizer` and `rule` are the student's where the teacher is an endpoint: there, text is all there is."""

    path: Path
    tokenizer: Any
    rule: StopRule
    dtype: str

    def name(self, config: Distill) -> str:
        """What its translations are filed under."""
        # Not the dtype that auto stands for here: a run that goes on elsewhere keeps what it has.
        return f"{config.endpoint} {config.teacher}" if config.endpoint else f"{identity(self.path)} {config.dtype}"


def distill(context: Context) -> dict[str, Any]:
    """Writes `distill/teacher.parquet` and `distill/summary.json`.

    Columns: id, pair, source, reference, translation, finish (`stop`, `length`, `loop`, `error`), tokens (generated),
    kept, reason (null where kept); with several samples also sample and score, the best one's; with `top_k` also
    token_ids, top_ids and top_logprobs (k for each token, in a row). One row for each source, in their order; no id is
    there twice. A table that a run with the same `cache` has made of the same text is taken over.

    Raises:
        UserError: the recipe or the cluster is not fit for it, or the engine failed; what is translated is kept.
    """
    config = context.recipe.distill
    if config is None:
        raise UserError("the recipe has no distill section")
    pairs = (context.splits.train if config.sources == "train" else context.splits.mono)[: config.limit]
    if not pairs:
        wanted = "training pairs" if config.sources == "train" else "monolingual sentences"
        raise UserError(f"distill: no {wanted} to translate; name data.<name>.{config.sources}")
    check(context)
    teacher = _teacher(context, config)
    began = time.monotonic()
    asked = _digest(context, config, teacher, pairs)
    judged = _judged(context, config, asked)
    cache = RunDir(context.recipe.cache) if context.recipe.cache else None
    if context.rundir.complete("distill"):
        there = context.rundir.read_json("distill/summary.json")
        if there.get("of") == judged:
            _tidy(context, asked, judged, cache)  # what one that was killed at the end left to do
            return there
    if cache is not None and (place := _made_before(cache, judged)):
        _copy(cache, place, context.rundir, "distill")
        context.reporter.line(f"distill: taken over from {cache.uri(place)}")
        return context.rundir.read_json("distill/summary.json")
    parts = Parts(context.rundir, f"{WORK}/{asked}", len(pairs), config.samples)
    before = int(parts.done.sum())
    if before < len(parts.done):
        _translate(context, config, teacher, pairs, parts)
    assert parts.done.all(), "every row is translated"
    with context.rundir.building("distill") as target:
        summary = {
            "schema": 1,
            "of": judged,
            "teacher": str(config.teacher),
            "teacher_in": "directory" if config.is_another and Path(config.teacher).is_dir() else None,
            "fingerprint": None if config.endpoint else fingerprint(teacher.path),
            **_write(context, config, teacher, pairs, parts, target / "teacher.parquet"),
            "found_from_before": before,
            "engine": {
                "name": config.endpoint or "vllm",
                "dtype": None if config.endpoint else teacher.dtype,
                "engines": config.engines,
                "logs": cluster.session_logs(),
            },
            "seconds": round(time.monotonic() - began, 1),
        }
        (target / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _tidy(context, asked, judged, cache)
    if not summary["kept"]:
        most = max(summary["rejected"], key=lambda reason: summary["rejected"][reason])
        context.reporter.line(f"distill: every row was rejected, most as {most!r}: see distill/teacher.parquet")
    return summary


def _tidy(context: Context, asked: str, judged: str, cache: RunDir | None) -> None:
    """The table is there: its parts are not needed any more, and the cache gets it where it has not."""
    context.rundir.remove(f"{WORK}/{asked}")
    if cache is not None and cache.uri("") != context.rundir.uri("") and not _made_before(cache, judged):
        _copy(context.rundir, "distill", cache, f"{SHARED}/{judged}")


def _made_before(cache: RunDir, judged: str) -> str | None:
    """Where in a cache the table is: its own, or one that another run left there."""
    for place in ("distill", f"{SHARED}/{judged}"):
        if cache.complete(place) and cache.read_json(f"{place}/summary.json").get("of") == judged:
            return place
    return None


def _copy(source: RunDir, name: str, target: RunDir, place: str) -> None:
    """The directory `name` of one run, whole, as `place` of another."""
    with target.building(place) as scratch:
        for file in source.local(name).iterdir():
            if file.name != "manifest.json":
                shutil.copyfile(file, scratch / file.name)


def engine_dtype(config: Distill, resources: Resources) -> str:
    """As the recipe says; if that is auto, bfloat16, or float32 on a CPU of this machine that is slow with it."""
    if config.dtype != "auto":
        return config.dtype
    is_here = cluster.address_of(resources) is None
    return "float32" if is_here and not cluster.num_gpus() and not machine.computes_bfloat16() else "bfloat16"


def _files(context: Context, config: Distill) -> Path:
    """Where the teacher's tokenizer and settings are: the original's where the teacher is cut or adapted from that, as
    neither changes them, or speaks at an endpoint.
    """
    if not config.is_another:
        return context.original
    with context.reporter.task("teacher") as task, heartbeat(task):
        return locate(config.teacher, tell=context.reporter.line)


def _teacher(context: Context, config: Distill) -> Teacher:
    files = _files(context, config)
    tokenizer = load_tokenizer(files)
    rule = read_stop_rule(files, tokenizer, context.prompt.newline)
    path = files if config.is_another else context.baseline
    return Teacher(path, tokenizer, rule, engine_dtype(config, context.recipe.resources))


def _check_words(config: Distill, teacher: Any, student: Any) -> None:
    """A teacher whose probabilities are to be learned from has the words of the model that learns; both tokenizers."""
    if words_of(teacher) != words_of(student):
        raise UserError(
            f"heal.loss.teacher: stored: the teacher {config.teacher} has another vocabulary than the model that "
            f"learns; use heal.loss.teacher: base, or the teacher's translations alone"
        )


def _digest(context: Context, config: Distill, teacher: Teacher, pairs: Sequence[Pair]) -> str:
    """What an interrupted run must share with the one that goes on with its translations; 12 hex digits."""
    tokenizer = teacher.tokenizer
    asked = [
        *(teacher.name(config), config.samples, config.heat, config.top_k, context.prompt.model_dump(mode="json")),
        *(words_of(tokenizer), sorted(teacher.rule.stop), tokenizer.chat_template if context.prompt.chat else None),
    ]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for pair in pairs:
        digest.update(f"{pair.pair}\0{pair.source}\0".encode())
    return digest.hexdigest()[:12]


def _judged(context: Context, config: Distill, asked: str) -> str:
    """All that the finished table depends on: what was asked, how it is judged, and by which other text."""
    judged = {key: value for key, value in changed(config).items() if key not in FREE}
    digest = hashlib.sha256(f"{asked}{json.dumps(judged, sort_keys=True)}".encode())
    for pair in (*context.splits.train, *context.splits.held_out):
        digest.update(f"{pair.pair}\0{pair.source}\0{pair.target}\0".encode())
    return digest.hexdigest()[:12]


def check(context: Context) -> None:
    """Refuses, before anything is translated, what could only fail after it.

    Raises:
        UserError: COMET or sentence-transformers is asked for and not there, a chat prompt for an endpoint or a teacher
            that has none, or a teacher of another vocabulary whose probabilities are to be learned.
    """
    config = context.recipe.distill
    assert config is not None
    for name in config.comets:
        check_metric(name)
    if config.filters.min_embedding_similarity is not False and find_spec("sentence_transformers") is None:
        raise UserError(
            "distill.filters.min_embedding_similarity needs the package sentence-transformers: pip install it beside "
            "raylp, or set the filter to false"
        )
    if config.endpoint is not None and context.prompt.chat:
        raise UserError("distill.endpoint is asked for completions, which know no turns: set prompt.chat: false")
    tokenizer = load_tokenizer(_files(context, config))
    if context.prompt.chat and tokenizer.chat_template is None:
        raise UserError(f"distill.teacher: {config.teacher} has no chat template: set prompt.chat: false")
    if context.recipe.heal is not None and context.recipe.heal.loss.stored:
        _check_words(config, tokenizer, load_tokenizer(context.original))


def _translate(context: Context, config: Distill, teacher: Teacher, pairs: Sequence[Pair], parts: Parts) -> None:
    """Translates what no part has yet; a part appears for every batch."""
    missing = parts.missing()
    with context.reporter.task("distill", len(parts.done)) as task:
        task.update(len(parts.done) - len(missing), "starting Ray")
        cluster.start(context.recipe.resources)
        gpus = 0 if config.endpoint else _gpus(config)
        cluster.require(f"distill with {config.engines} engines", config.num_cpus, gpus)
        size = config.batch_size
        batches = [missing[start : start + size].tolist() for start in range(0, len(missing), size)]
        mean_words = sum(len(pair.source.split()) for pair in pairs) / len(pairs)

        def requests(numbers: Sequence[int]) -> list[tuple[int, Request]]:
            asked = [
                (pairs[number // config.samples].source, pairs[number // config.samples].pair) for number in numbers
            ]
            made = context.prompt.requests(teacher.tokenizer, asked, mean_words)
            return list(zip(numbers, made, strict=True))

        with heartbeat(task), _engine_logs(context) as log:
            if config.endpoint is not None:
                task.beat(f"asking {config.endpoint}")
                texts = ([(n, teacher.tokenizer.decode(r.tokens, skip_special_tokens=True), r.max_new_tokens)
                          for n, r in requests(batch)] for batch in batches)  # fmt: skip
                made = ask_endpoint(config, texts, ["\n"] if context.prompt.newline else [])
            else:
                task.beat("starting vLLM")
                needed = max(len(r.tokens) + r.max_new_tokens for batch in batches for _, r in requests(batch))
                longest = min(needed, max_positions(teacher.path) or needed, config.max_model_len)
                made = say(config, teacher.path, teacher.dtype, map(requests, batches), teacher.rule, longest, gpus)
            try:
                for part in made:
                    parts.add(part)
                    task.advance(len(part), "")
            except UserError:
                raise
            except Exception as error:  # of many classes, the engine's own among them; all end here
                raise _failure(log, error) from error


def _gpus(config: Distill) -> int:
    """GPUs for all engines, where the cluster has any."""
    import ray

    return config.engines * config.gpus_per_engine if ray.cluster_resources().get("GPU", 0) else 0


@dataclass(frozen=True)
class Chosen:
    """The translation of a source that was kept. `spent`: tokens generated for it and those it was chosen from."""

    row: Row
    said: Said
    output: Output
    sample: int
    score: float | None
    spent: int


def _write(
    context: Context, config: Distill, teacher: Teacher, pairs: Sequence[Pair], parts: Parts, path: Path
) -> dict[str, Any]:
    """Chooses, judges and writes, a few rows at a time; what the summary says of it."""
    import pyarrow.parquet

    others = context.splits.held_out
    tokens = kept = 0
    with ExitStack() as stack, context.reporter.task("filter", len(pairs)) as task:
        rate = _rate(context, config, stack)
        judge = Judge(
            config.filters,
            usual_length_ratios([*context.splits.train, *others]),
            HeldOut.of(others),
            _similarity(config),
            _comet(context, config, stack),
        )
        writer = None
        said, waiting, names = iter(parts), iter(pairs), unique_ids(pairs)
        while chunk := list(islice(waiting, CHUNK)):
            chosen = _choose(context, config, teacher, chunk, said, rate)
            found = judge.reasons([one.row for one in chosen])
            table = _table(config, list(islice(names, len(chunk))), chunk, chosen, found)
            writer = writer or stack.enter_context(pyarrow.parquet.ParquetWriter(path, table.schema))
            writer.write_table(table)
            tokens += sum(one.spent for one in chosen)
            kept += found.count(None)
            task.advance(len(chunk))
    return {"rows": len(pairs), "kept": kept, "rejected": judge.taken, "samples": config.samples, "tokens": tokens}


def unique_ids(pairs: Sequence[Pair]) -> Iterator[str]:
    """Their ids; of those that several corpora share, all but the first with a number behind, the same in every run."""
    used: set[str] = set()
    for pair in pairs:
        name, number = pair.id, 1
        while name in used:
            number += 1
            name = f"{pair.id}~{number}"
        used.add(name)
        yield name


def _choose(
    context: Context, config: Distill, teacher: Teacher, pairs: Sequence[Pair], said: Iterator[Said], rate: Rate | None
) -> list[Chosen]:
    """The best translation of each of `pairs`, whose samples come next in `said`."""
    each = [list(islice(said, config.samples)) for _ in pairs]
    outputs = [[_output(one, teacher, context.prompt.newline) for one in samples] for samples in each]
    rows = [
        [
            Row(pair.pair, pair.source, pair.target, output.text, output.finish, _as_said(one, output, teacher))
            for one, output in zip(samples, own, strict=True)
        ]
        for pair, samples, own in zip(pairs, each, outputs, strict=True)
    ]
    scores: list[float] = []
    if rate is not None:
        likelihoods = [one.logprob / len(one.tokens) if one.logprob is not None else None for s in each for one in s]
        scores = list(rate([row for own in rows for row in own], likelihoods))
    chosen = []
    for place, (samples, own, texts) in enumerate(zip(each, rows, outputs, strict=True)):
        rated = scores[place * config.samples : (place + 1) * config.samples]
        number = best(own, rated) if rated else 0
        spent = sum(len(one.tokens or text.tokens) for one, text in zip(samples, texts, strict=True))
        chosen.append(
            Chosen(own[number], samples[number], texts[number], number, rated[number] if rated else None, spent)
        )
    return chosen


def _as_said(said: Said, output: Output, teacher: Teacher) -> str:
    """The text before its lines are joined; a newline that ends it is no part of it."""
    if said.error or said.text is not None:
        return said.text or ""
    return teacher.tokenizer.decode(output.tokens, skip_special_tokens=True)


def _output(said: Said, teacher: Teacher, newline: bool) -> Output:
    """The text as every other backend gives it; for a row that failed, what went wrong."""
    if said.error:
        return Output(said.error, (), "error")
    if said.text is not None:  # an endpoint's; how long it is, and whether it repeats itself, the student's tokens say
        tokens = teacher.tokenizer(said.text, add_special_tokens=False).input_ids
        finish = "loop" if teacher.rule.cut(tokens)[1] == "loop" else said.finish or "stop"
        return Output(said.text.strip(), tuple(tokens), finish)
    if not said.tokens:
        return Output("", (), "stop")
    return to_output(teacher.tokenizer, *teacher.rule.cut(said.tokens), newline)


def _table(
    config: Distill, ids: Sequence[str], pairs: Sequence[Pair], chosen: Sequence[Chosen], found: Sequence[str | None]
) -> Any:
    import pyarrow

    columns = {
        "id": list(ids),
        "pair": [pair.pair for pair in pairs],
        "source": [pair.source for pair in pairs],
        "reference": [pair.target for pair in pairs],
        "translation": [one.row.translation for one in chosen],
        "finish": [one.row.finish for one in chosen],
        "tokens": [len(one.output.tokens) for one in chosen],
        "kept": [reason is None for reason in found],
        "reason": pyarrow.array(found, pyarrow.string()),
    }
    if config.samples > 1:
        columns["sample"] = [one.sample for one in chosen]
        columns["score"] = pyarrow.array([one.score for one in chosen], pyarrow.float64())
    if config.top_k is not None:
        ends = [len(one.output.tokens) for one in chosen]
        tops = [one.said.top for one in chosen]
        columns["token_ids"] = pyarrow.array(
            [list(one.output.tokens) for one in chosen], pyarrow.list_(pyarrow.int32())
        )
        for name, kind in (("ids", pyarrow.int32()), ("logprobs", pyarrow.float16())):
            values = [getattr(top, name)[:end].ravel() if top else [] for top, end in zip(tops, ends, strict=True)]
            columns[f"top_{name}"] = pyarrow.array(values, pyarrow.list_(kind))
    return pyarrow.table(columns)


# --- what judges by a model ---


def _rate(context: Context, config: Distill, stack: ExitStack) -> Rate | None:
    """How samples are compared; None where there is only one."""
    if config.samples == 1:
        return None
    if config.by == "likelihood":
        return by_likelihood
    if not is_comet(config.by):
        return by_chrf
    scores = _comet_scores(context, config.by, stack)
    return lambda rows, _: scores(rows)


def _comet(context: Context, config: Distill, stack: ExitStack) -> Callable[[Sequence[Row]], Sequence[float]] | None:
    filters = config.filters
    return _comet_scores(context, filters.comet, stack) if filters.min_comet is not False else None


def _comet_scores(context: Context, name: str, stack: ExitStack) -> Callable[[Sequence[Row]], Sequence[float]]:
    """Scores by a COMET checkpoint, in its own process until the stack ends."""
    from raylp.metrics.comet import CometScorer

    log = context.rundir.logs() / "comet-distill.log"
    scorer = stack.enter_context(CometScorer(full_name(name), log=log))

    def scores(rows: Sequence[Row]) -> Sequence[float]:
        # Of monolingual text there are no references; a checkpoint that needs them says so.
        with_references = all(row.reference for row in rows)
        told = ({"ref": row.reference} if with_references else {} for row in rows)
        return scorer.score([{"src": r.source, "mt": r.translation, **ref} for r, ref in zip(rows, told, strict=True)])

    return scores


def _similarity(config: Distill) -> Callable[[Sequence[Row]], Sequence[float]] | None:
    """Cosines of source and translation by a sentence-transformers model."""
    if config.filters.min_embedding_similarity is False:
        return None
    name = config.filters.embedding_model
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"distill.filters.embedding_model {name!r} cannot be loaded: {error}", 1) from error

    def similarity(rows: Sequence[Row]) -> list[float]:
        texts = [row.source for row in rows], [row.translation for row in rows]
        a, b = (model.encode(list(side), normalize_embeddings=True) for side in texts)
        return [float(value) for value in (a * b).sum(1)]

    return similarity


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
    text, said = str(error), _said_by_worker(str(error))
    with log.open("a") as stream:
        stream.write(f"{text}\n{said}\nRay's own logs of the workers: {cluster.session_logs()}\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Ray Data's own advice on retries may follow the cause.
    causes = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception)\b.*: ", line)] or lines
    last = (error_lines(said) or causes or [type(error).__name__])[-1][:MESSAGE]
    advice = "run again to go on"
    if "initialization failed" in text:
        advice = "it never started, so another teacher may be needed"
    if "cuda" in text.lower() and "memory" in text.lower():
        advice = "raise distill.gpus_per_engine, or take a smaller teacher"
    elif "memory" in text.lower():
        advice = "lower distill.engines, or raise $VLLM_CPU_KVCACHE_SPACE where it is the cache that is too small"
    return UserError(f"distill: the engine failed: {last}; {advice}; log: {log}", 1)


def _said_by_worker(error: str) -> str:
    """The end of what a worker that died wrote before, which says why; empty where that lies on another machine."""
    pids = re.findall(r"\bpid[=:] ?(\d+)", error)
    logs = [file for pid in pids[:1] for file in Path(cluster.session_logs()).glob(f"worker-*-{pid}.err")]
    return "\n".join(logs[0].read_text(errors="replace").splitlines()[-LOG_LINES:]) if logs else ""
