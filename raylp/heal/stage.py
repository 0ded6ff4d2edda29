"""The stage that heals: Ray Train with DeepSpeed, one run for each model, then a stock checkpoint again."""

import hashlib
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.config import changed
from raylp.context import Context
from raylp.data.corpus import write_jsonl
from raylp.data.tokens import Example, Top
from raylp.errors import UserError
from raylp.heal import plan
from raylp.heal.config import FREE, Heal, Loss
from raylp.heal.dev import BEST, Asked, Scorer
from raylp.heal.examples import TEACHER, choose, tokenise
from raylp.heal.loop import MEMORY_ADVICE, MEMORY_KNOBS, SCRATCH, STATE, STEPS_OF_A_BLOCK, is_out_of_memory
from raylp.heal.loop import train as train_loop
from raylp.models.checkpoint import card_for, read_card
from raylp.models.load import load_tokenizer
from raylp.models.source import fingerprint
from raylp.names import kind_of
from raylp.process import run_apart
from raylp.progress import Task
from raylp.rundir import RunDir
from raylp.search.prune import prune_leg
from raylp.search.stage import leg_folder, leg_stops, search_leg

WORK, LOOKS = ".work/heal", ".work/heal-looks"
DIGITS = 12  # of a digest, in hex
POLL_S = 1.0
MAX_FAILURES = 3


class Board:
    """What the first worker has to tell; an actor, so that it is reached from any machine of the cluster."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.note = "starting the workers"
        self.problem: str | None = None
        self.by_step: dict[int, float] = {}

    def add(self, record: dict[str, Any]) -> None:
        """A finished step."""
        self.records.append(record)

    def say(self, note: str) -> None:
        """What is going on between steps."""
        self.note = note

    def give_up(self, problem: str) -> None:
        """Something is wrong that trying again would not mend."""
        self.problem = problem

    def score(self, step: int, value: float) -> None:
        """chrF++ of the dev split with the weights after this step."""
        self.by_step[step] = value

    def scores(self) -> dict[int, float]:
        """What was told so far."""
        return self.by_step

    def given_up(self) -> str | None:
        """The problem, if there is one."""
        return self.problem

    def latest(self) -> tuple[int, float | None, str]:
        """The last step, its loss, and the note."""
        note = self.note
        if self.by_step:
            step = max(self.by_step)
            note += f", dev chrF++ {self.by_step[step]:.1f} at step {step}"
        if not self.records:
            return 0, None, note
        return self.records[-1]["step"], self.records[-1]["loss"], note


def heal(context: Context) -> dict[str, Any]:
    """Heals the pruned (or repaired) model to `healed-N`, and the baseline in the same way to `baseline-healed`.

    Both learn the same examples in the same order: what remains between them is the layers. With `heal.every`, each
    healed model is searched and pruned further, and healed again; the baseline is healed as often.

    Raises:
        UserError: there is no pruned model or no data yet, or training failed.
    """
    config, start = _section(context), _section(context).start
    stops = leg_stops(context)
    names = [name for name in context.models() if kind_of(name) == start]
    if not names:
        verb = "prune" if start == "pruned" else "repair"
        raise UserError(f"heal: there is no {start} model in the run directory; run 'raylp {verb}' first", 1)
    done = {}
    for number, name in enumerate([f"pruned-{stop}" for stop in stops] or names):
        if stops:
            search_leg(context, stops, number)
        if number and stops:
            prune_leg(context, stops[number], stops[number - 1])
        healed = name.replace(f"{start}-", "healed-")
        source = context.rundir.local(f"models/{name}")
        removed = (read_card(source) or {}).get("removed", [])
        purpose = "after pruning" if start == "pruned" else f"{start} after pruning"
        done[healed] = heal_model(context, source, healed, purpose, removed)
    if config.baseline:
        source = context.baseline
        for stop in stops[:-1]:  # healed as often as the pruned one, each time from what the last healing left
            leg = replace(context, rundir=leg_folder(context, stop), start=context.baseline)
            heal_model(leg, source, "baseline-healed", "as the pruned model", [], taught=context.rundir)
            source = leg.rundir.local("models/baseline-healed")
        done["baseline-healed"] = heal_model(context, source, "baseline-healed", "as the pruned model", [])
    return done


def adapt(context: Context) -> dict[str, Any]:
    """Trains the original on the authentic training pairs, to `adapted`: the baseline where pruning comes after."""
    config = adapting(_section(context))
    return {"adapted": heal_model(context, context.original, "adapted", "before pruning", [], config)}


def adapting(config: Heal) -> Heal:
    """The section without what needs a teacher: there is none before pruning."""
    return config.model_copy(update={"data": "authentic", "teacher_share": None, "loss": Loss()})


def heal_model(
    context: Context,
    source: Path,
    name: str,
    purpose: str,
    removed: list[int],
    config: Heal | None = None,
    taught: RunDir | None = None,
) -> dict[str, Any]:
    """Trains the checkpoint `source` into `models/<name>`; after a crash, the same call goes on at the last checkpoint,
    and what was healed whole is not healed again.

    `purpose` is shown and kept in the result; `removed`: layers that are gone already, for the checkpoint's card;
    `taught`: where the teacher's translations are, if not in the context's run directory.
    `heal/<name>.jsonl` holds every step: step, epoch, lr, loss (nats per target token), tokens, computed (tokens of the
    rows, of which `padding` were padding), memory (bytes, the most so far), seconds, and where dev was looked at
    dev_loss and perhaps dev_chrf; where `heal.loss` has parts beside cross-entropy, each of them. Returns {"examples",
    "steps", "kept" (the step whose weights are the model's), "loss", "dev_loss", "dev_chrf", "padding" (share),
    "tokens_per_s" (learned), "seconds", "purpose"}.

    Raises:
        UserError: no data, too few CPUs or GPUs, or training failed; with the last line of what the engine said.
    """
    config = config or _section(context)
    learning = replace(context, rundir=taught) if taught is not None else context
    train, dev = _examples(learning, config, source)
    cluster.start(context.recipe.resources)
    gpus = _gpus(config)
    beside = 1 if gpus and config.keep == "chrF++" else 0
    what = f"heal with {config.workers} workers{' and one GPU for heal.keep: chrF++' if beside else ''}"
    cluster.require(what, config.workers, gpus + beside)
    if not dev and config.looks_at_dev:
        raise UserError("heal.keep: chrF++ and heal.patience look at the dev split, and no corpus has one")
    steps = plan.steps(len(train), config.batch_size, config.epochs, config.seed)
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if gpus else "float32")
    job: dict[str, Any] = {"source": str(source), "heal": config.model_dump(), "dtype": dtype}
    if config.loss.needs_base:
        job |= {"teacher": str(context.baseline), "removed": removed}
    run_name = f"{name}-{_digest(source, job, train, dev)}"
    _clear(context.rundir, name, run_name)
    if context.rundir.complete(f"models/{name}") and context.rundir.exists(f"heal/{name}.json"):
        done = context.rundir.read_json(f"heal/{name}.json")
        if done.pop("run") == run_name:
            _clear(context.rundir, name)
            return done
    began = time.monotonic()
    shutil.rmtree(context.rundir.scratch(SCRATCH))  # what was left by one that was killed
    with tempfile.TemporaryDirectory(dir=context.rundir.scratch(SCRATCH)) as scratch:
        trained = Path(scratch) / "trained"
        with context.reporter.task(name, len(steps)) as task:
            batches = [[train[i] for i in step] for step in steps]
            history = _fit(context, name, run_name, job, batches, dev, gpus, task, trained)
        # What an earlier run's card says of its model is not what this run says.
        card = (read_card(source) if source != context.original else None) or card_for(
            context.recipe.model.name, fingerprint(context.original), "", removed, context.prompt.model_dump()
        )
        with context.rundir.building(f"models/{name}") as target, context.reporter.task(f"merging {name}") as task:
            _merge(context, name, source, trained, target, card, task)
    context.rundir.write_text(f"heal/{name}.jsonl", write_jsonl(history))
    result = {
        "examples": len(train),
        "steps": len(history),
        **_kept(config, history),
        "padding": round(sum(r["padding"] for r in history) / sum(r["computed"] for r in history), 4),
        "tokens_per_s": round(sum(r["tokens"] for r in history) / sum(r["seconds"] for r in history), 1),
        "seconds": round(time.monotonic() - began, 1),
        "purpose": purpose,
    }
    if len(history) < len(steps):
        context.reporter.line(
            f"{name}: ended after {len(history)} of {len(steps)} steps: {config.patience} looks at dev were no better"
        )
    context.rundir.write_json(f"heal/{name}.json", {"run": run_name, **result})
    _clear(context.rundir, name)
    shutil.rmtree(context.rundir.scratch(SCRATCH))
    return result


def _clear(rundir: RunDir, name: str, but: str = "") -> None:
    """Removes the checkpoints of the model's trainings: of all, or of those that did not have the inputs of `but`."""
    for place in (WORK, LOOKS):
        for other in rundir.names(place):
            if other != but and re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{{DIGITS}}}", other):
                rundir.remove(f"{place}/{other}")


def _kept(config: Heal, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which step's weights are the model's, and what was measured there; loss: that of the last step."""
    key, more = ("dev_chrf", True) if config.keep == "chrF++" else ("dev_loss", False)
    values = {record["step"]: record[key] for record in history if key in record}
    kept = history[-1]["step"] if config.keep == "last" or not values else plan.best_look(values, more)
    at = history[kept - 1]
    told: dict[str, Any] = {name: at[name] for name in ("dev_loss", "dev_chrf") if name in at}
    return {"kept": kept, "loss": history[-1]["loss"], "dev_loss": None, **told}


def _section(context: Context) -> Heal:
    if context.recipe.heal is None:
        raise UserError("the recipe has no heal section")
    return context.recipe.heal


def _examples(context: Context, config: Heal, source: Path) -> tuple[list[Example], list[Example]]:
    """Training and development examples as tokens."""
    teacher: list[dict[str, Any]] = []
    if config.data in ("teacher", "both"):
        if context.rundir.complete("distill"):
            teacher = _table(context, ["id", "pair", "source", "translation", "kept"]).to_pylist()
        elif config.data == "teacher" or context.recipe.distill is not None:
            raise UserError("heal: there is no teacher data; run 'raylp distill' first, or set heal.data: authentic", 1)
    shown, stored = context.prompt.examples, config.loss.stored
    pairs = choose(context.splits.train, teacher, config.data, shown, config.teacher_share, stored)
    tokenizer = load_tokenizer(source)
    said = _said(context) if config.loss.stored else {}
    train = tokenise(pairs, context.prompt, tokenizer, config.max_tokens, said)
    if not pairs and teacher and not any(row["kept"] for row in teacher):
        raise UserError(
            f"heal: the filters rejected all {len(teacher)} translations of the teacher (distill/teacher.parquet says "
            f"why): loosen distill.filters, or set heal.data: authentic"
        )
    if not train:
        raise UserError(
            f"heal: nothing to learn from: {len(pairs)} training pairs beside the prompt's examples, none of at most "
            f"{config.max_tokens} tokens (heal.max_tokens); add training data"
        )
    return train, tokenise(context.splits.dev, context.prompt, tokenizer, config.max_tokens)


def _table(context: Context, columns: Sequence[str]) -> Any:
    """Columns of the teacher's translations, as Arrow has them."""
    import pyarrow.parquet

    file = context.rundir.local("distill") / "teacher.parquet"
    there = pyarrow.parquet.read_schema(file).names
    return pyarrow.parquet.read_table(file, columns=[name for name in columns if name in there])


def _said(context: Context) -> dict[tuple[str, str], tuple[tuple[int, ...], Top]]:
    """By (pair, id): the teacher's own tokens and what else it might have said, as `tokenise` takes them."""
    table = _table(context, ["id", "pair", "kept", "token_ids", "top_ids", "top_logprobs"])
    if "top_ids" not in table.column_names:
        raise UserError("heal.loss.teacher: stored needs the teacher's probabilities: set distill.top_k", 2)
    found = {}
    for batch in table.to_batches():
        rows = zip(*(batch[column].to_pylist() for column in ("pair", "id", "kept")), strict=True)
        for number, (pair, name, kept) in enumerate(rows):
            if kept:
                # Arrow's own values: as Python numbers they would take twenty times the memory.
                tokens, ids, logprobs = (
                    batch[column][number].values.to_numpy(zero_copy_only=False)
                    for column in ("token_ids", "top_ids", "top_logprobs")
                )
                top = Top(ids.reshape(len(tokens), -1).copy(), logprobs.reshape(len(tokens), -1).copy())
                found[pair, f"{TEACHER}{name}"] = tuple(tokens.tolist()), top
    return found


def _gpus(config: Heal) -> int:
    """GPUs for the run: one for each worker where the cluster has any."""
    import ray

    return config.workers if ray.cluster_resources().get("GPU", 0) else 0


def _digest(source: Path, job: dict[str, Any], train: Sequence[Example], dev: Sequence[Example]) -> str:
    """What an interrupted run must share with the one that goes on with its checkpoints; 12 hex digits."""
    digest = hashlib.sha256(fingerprint(source).encode())
    section = changed(Heal.model_validate(job["heal"]))
    bound = {key: value for key, value in section.items() if key not in FREE}
    digest.update(json.dumps([bound, job["dtype"]], sort_keys=True).encode())
    if "teacher" in job:
        digest.update(f"{fingerprint(Path(job['teacher']))} {job['removed']}".encode())
    for example in (*train, *dev):
        digest.update(repr((example.prompt, example.target)).encode())
        if example.top is not None:
            digest.update(example.top.ids.tobytes() + example.top.logprobs.tobytes())
    return digest.hexdigest()[:DIGITS]


def _fit(
    context: Context,
    name: str,
    run_name: str,
    job: dict[str, Any],
    steps: Sequence[Sequence[Example]],
    dev: Sequence[Example],
    gpus: int,
    task: Task,
    trained: Path,
) -> list[dict[str, Any]]:
    """Runs the training on every step's examples; the weights to keep are put into `trained`, the steps returned."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Here, where the driver is: another node may be taken away, and only its workers start again elsewhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    rundir = context.rundir
    size = STEPS_OF_A_BLOCK
    blocks = [ray.put(list(steps[start : start + size])) for start in range(0, len(steps), size)]
    scorer = _scorer(context, job, f"{LOOKS}/{run_name}", board, gpus) if job["heal"]["keep"] == "chrF++" else None
    trainer = _trainer()(
        train_loop,
        train_loop_config={
            **job,
            "train": blocks,
            "steps": len(steps),
            "dev": ray.put(list(dev)),
            "board": board,
            "scorer": scorer,
            "run_dir": rundir.uri(""),
        },
        scaling_config=ScalingConfig(num_workers=job["heal"]["workers"], use_gpu=gpus > 0),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=run_name,
            # Every worker writes its part of a checkpoint there, so it must be reachable from all their machines.
            storage_path=rundir.uri(WORK),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _Watch(board, task):
        try:
            result = trainer.fit()
        except Exception as error:  # of many classes, the engine's own among them; all end here
            raise _failure(context, name, error) from error
    if problem := ray.get(board.given_up.remote()):
        raise UserError(f"heal {name}: {problem}", 1)
    assert result.checkpoint is not None, "the loop's last report carries a checkpoint"
    result.checkpoint.to_directory(str(trained))
    state = json.loads((trained / STATE).read_text())
    assert state["finished"], "Ray Train returned before the last step"
    history = state["history"]
    if scorer is not None:
        for step, score in _finish(scorer, task, len(history)).items():
            history[step - 1]["dev_chrf"] = score
        shutil.rmtree(trained)
        shutil.copytree(rundir.local(f"{LOOKS}/{run_name}/{BEST}"), trained)
    return history


def _trainer() -> Any:
    """Ray Train's trainer for torch, the class. On a Ray of this run's own it does without the actor that clears
    placement groups away behind a driver that died: there, all of Ray goes with the driver. That actor asks the
    dashboard, which a local Ray does not have, and the end of every training would wait twelve seconds for it.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]

    return LocalTrainer if cluster.is_own() else TorchTrainer


def _scorer(context: Context, job: dict[str, Any], place: str, board: Any, gpus: int) -> Any:
    """The actor that translates the dev split beside the training."""
    import ray

    tokenizer = load_tokenizer(Path(job["source"]))
    dev = context.splits.dev
    requests = context.prompt.requests(tokenizer, [(pair.source, pair.pair) for pair in dev])
    asked = [Asked(pair.pair, request, pair.target) for pair, request in zip(dev, requests, strict=True)]
    options = {
        "num_cpus": 0,
        "num_gpus": 1 if gpus else 0,
        "max_concurrency": 4,
        "max_restarts": 3,
        "max_task_retries": 3,
    }
    return (
        ray.remote(Scorer)
        .options(**options)
        .remote(
            job["source"],
            job["heal"],
            job["dtype"],
            context.prompt.newline,
            asked,
            context.rundir.uri(""),
            place,
            board,
            job["heal"]["workers"],
        )
    )


def _finish(scorer: Any, task: Task, last: int) -> dict[int, float]:
    """Waits for the scores up to step `last`; the actor's own words where it failed."""
    import ray

    task.update(task.done, "translating dev")
    try:
        with cluster.own_errors():
            return ray.get(scorer.finish.remote(last))
    except ray.exceptions.RayActorError as error:
        raise UserError(f"translating the dev split failed: its actor died: {error}; run again to go on", 1) from error
    finally:
        ray.kill(scorer)


class _Watch:
    """Shows on the task what the board says, until the block ends; `fit` itself blocks."""

    def __init__(self, board: Any, task: Task) -> None:
        self.board = board
        self.task = task
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _run(self) -> None:
        import ray

        while not self.stopped.wait(POLL_S):
            try:
                step, loss, note = ray.get(self.board.latest.remote(), timeout=30)
            except ray.exceptions.RayError:
                continue  # a busy or lost board is no reason to stop training
            self.task.update(max(step, self.task.done), note if loss is None else f"loss {loss:.3f}  {note}")


def _failure(context: Context, name: str, error: Exception) -> UserError:
    """The engine's own last line, what to do, and where the rest is."""
    workers: dict[int, Exception] = getattr(error, "worker_failures", {}) or {}
    texts = [str(failure) for failure in workers.values()] or [str(error)]
    log = context.rundir.logs() / f"heal-{name}.log"
    log.write_text("\n\n".join([*texts, f"Ray's own logs of the workers: {cluster.session_logs()}"]) + "\n")
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    if is_out_of_memory("\n".join(texts)):
        return UserError(f"heal {name}: {MEMORY_ADVICE}; log: {log}", 1)
    if "oom killer" in "\n".join(texts).lower():  # Ray names it as one cause of several
        return UserError(
            f"heal {name}: a worker was killed {MAX_FAILURES + 1} times, most often for want of memory: "
            f"{MEMORY_KNOBS}; log: {log}",
            1,
        )
    return UserError(f"heal {name}: training failed {MAX_FAILURES + 1} times: {last}; log: {log}", 1)


def _merge(
    context: Context, name: str, source: Path, trained: Path, target: Path, card: dict[str, Any], task: Task
) -> None:
    """In a process of its own, so that the driver never holds a model."""
    note = trained / "card.json"
    note.write_text(json.dumps(card, ensure_ascii=False), encoding="utf-8")
    log = context.rundir.logs() / f"heal-{name}-merge.log"
    command = [sys.executable, "-m", "raylp.heal.trainable", *map(str, (source, trained, target, note))]
    if problem := run_apart(command, log, task.beat):
        raise UserError(f"heal {name}: the trained weights could not be merged: {problem}; log: {log}", 1)
