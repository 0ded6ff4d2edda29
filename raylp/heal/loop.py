"""The training loop: runs in every worker of a Ray Train run, around a DeepSpeed engine."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylp.data.tokens import Example
from raylp.errors import UserError
from raylp.heal import plan
from raylp.heal.config import Heal
from raylp.heal.dev import BEHIND, WAIT_S
from raylp.heal.losses import Teacher, correspondence, losses
from raylp.heal.pack import loss_sum, why_not_packed
from raylp.heal.portable import gather, scatter
from raylp.heal.trainable import make_trainable, save_trained
from raylp.models.load import load_model, load_quantised, load_tokenizer
from raylp.models.stack import find_stack, text_config
from raylp.rundir import RunDir

STATE = "state.json"
BEST = "best.safetensors"
PORTABLE = "portable.safetensors"
TAG = "engine"
STEPS_OF_A_BLOCK = 64
SCRATCH = "heal-scratch"
MEMORY_KNOBS = (
    "lower heal.row_tokens or set heal.gradient_checkpointing=true (the result stays the same), share "
    "gradients and optimizer out with heal.zero_stage=2 and more heal.workers, or set heal.method=qlora"
)
MEMORY_ADVICE = f"out of memory: {MEMORY_KNOBS}"
_SIGNS_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "can't allocate memory",
    "unable to allocate",
    "alloc_failed",
    "memoryerror",
)


def train(job: dict[str, Any]) -> None:
    """Trains until the plan's last step; the last checkpoint it reports holds the trained weights (`save_trained`).

    `job`: `source` (checkpoint directory), `heal` (the section as a dict), `dtype`, `train` (references to blocks of
    steps, each a list of steps' lists of `Example`), `steps` (how many), `dev` (a reference to a list of `Example`),
    `board` (an actor that is told of every step), `run_dir` (its URL); `scorer` (an actor that translates dev), where
    the recipe asks for it; `teacher` (the checkpoint that was pruned) and `removed` (its layers that `source` lacks),
    for losses that need them.
    """
    import ray
    import ray.train

    config = Heal.model_validate(job["heal"])
    batches, dev_examples = Batches(job["train"]), ray.get(job["dev"])
    context = ray.train.get_context()
    worker = _Worker(context.get_world_rank(), context.get_world_size(), config, job["board"], job.get("scorer"))
    worker.scratch = RunDir(job["run_dir"]).scratch(SCRATCH)
    # Ray Train starts the workers again after any failure; some need the user first.
    if ray.get(job["board"].given_up.remote()) is not None:
        return
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None and _state(checkpoint)["finished"]:
        return
    try:
        _prepare_and_run(job, config, worker, batches, dev_examples, checkpoint)
    except (UserError, MemoryError, RuntimeError) as error:
        if isinstance(error, UserError):
            ray.get(job["board"].give_up.remote(str(getattr(error, "cause", None) or error)))
        elif is_out_of_memory(f"{type(error).__name__}: {error}"):
            ray.get(job["board"].give_up.remote(f"{MEMORY_ADVICE} ({error})"))
        raise  # so that Ray Train stops the other workers, which may wait for this one


def is_out_of_memory(message: str) -> bool:
    """Whether the message is that of an allocator, or of Ray's memory monitor."""
    return any(sign in message.lower() for sign in _SIGNS_OF_MEMORY)


def _prepare_and_run(
    job: dict[str, Any],
    config: Heal,
    worker: "_Worker",
    batches: "Batches",
    dev_examples: Sequence[Example],
    checkpoint: Any | None,
) -> None:
    import ray.train.torch
    import torch

    local_workers = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_workers))
    if config.matmul == "bfloat16":
        torch.set_float32_matmul_precision("medium")
    worker.say("loading the model")
    device = str(ray.train.torch.get_device())
    # Else it takes what it finds: a GPU that was not asked for, or nothing it knows.
    os.environ["DS_ACCELERATOR"] = device.partition(":")[0]
    source = Path(job["source"])
    if not source.is_dir():
        raise UserError(
            f"{source} is not on every machine of the cluster: put the run directory on a shared file system"
        )
    load = load_quantised if config.method == "qlora" else load_model
    model = load(source, job["dtype"], device)
    worker.text_config = text_config(model)
    worker.pad = load_tokenizer(source).pad_token_id or 0
    worker.packed = _packing(model, worker, [example for batch in batches.block(0) for example in batch])
    if config.loss.needs_base:
        worker.layers = list(model.get_submodule(find_stack(model).path))
        worker.teacher = _teacher(Path(job["teacher"]), job, model, device)
    torch.manual_seed(config.seed)  # adapters start at random: alike on all workers
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = make_trainable(model, config)
    model.train()
    engine = _engine(model, config, job["dtype"])
    _run(engine, worker, batches, job["steps"], dev_examples, checkpoint)


def _teacher(path: Path, job: dict[str, Any], student: Any, device: str) -> Teacher:
    """The unpruned model, frozen."""
    model = load_model(path, job["dtype"], device)
    layers = correspondence(find_stack(model).num_layers, job["removed"])
    if len(layers) != find_stack(student).num_layers:
        raise UserError(
            f"heal.loss: the student has {find_stack(student).num_layers} layers, but {path.name} without "
            f"{job['removed']} would have {len(layers)}"
        )
    return Teacher(model, layers)


class Batches:
    """Every step's examples, from blocks of steps in Ray's object store; one block is in memory at a time.

    `train`: references to the blocks, each of `STEPS_OF_A_BLOCK` steps but the last.
    """

    def __init__(self, train: Sequence[Any]) -> None:
        self.train = train
        self.held: tuple[int, list[list[Example]]] = -1, []

    def block(self, number: int) -> list[list[Example]]:
        """The examples of its steps; the next block is on its way to this machine meanwhile."""
        import ray

        if self.held[0] != number:
            self.held = number, ray.get(self.train[number])
            if number + 1 < len(self.train):
                ray.wait([self.train[number + 1]], timeout=0)
        return self.held[1]

    def of(self, step: int) -> list[Example]:
        """The examples of this step, counted from 1."""
        number, place = divmod(step - 1, STEPS_OF_A_BLOCK)
        return self.block(number)[place]


class _Worker:
    """This process's place in the run, and how it computes losses."""

    def __init__(self, rank: int, count: int, config: Heal, board: Any, scorer: Any = None) -> None:
        self.rank = rank
        self.scratch: Path | None = None  # where checkpoints are put together; None: where temporary files are
        self.count = count
        self.config = config
        self.board = board
        self.scorer = scorer
        self.text_config: Any = None
        self.pad = 0
        self.packed = False
        self.teacher: Teacher | None = None
        self.layers: list[Any] = []

    def say(self, note: str) -> None:
        """Shows `note` on the driver."""
        if self.rank == 0:
            self.board.say.remote(note)

    def tell(self, record: dict[str, Any]) -> None:
        """Hands a finished step to the driver."""
        if self.rank == 0:
            self.board.add.remote(record)

    def loss(self, model: Any, examples: Sequence[Example]) -> Any:
        """Cross-entropy, summed over target tokens."""
        return loss_sum(model, examples, self.text_config, self.packed, self.pad)

    def parts(self, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
        """All that the recipe's loss is made of, each summed over target tokens."""
        return losses(
            model, examples, self.text_config, self.packed, self.pad, self.config.loss, self.teacher, self.layers
        )

    def rows(self, batch: Sequence[Example]) -> list[list[Example]]:
        """This worker's rows of the batch; an empty row is work for the others only."""
        mine = plan.divide(range(len(batch)), batch, self.count, self.config.row_tokens, self.packed)[self.rank]
        return [[batch[i] for i in row] for row in mine]

    def enough(self, history: Sequence[dict[str, Any]]) -> bool:
        """Whether the looks so far say that it gets no better; the same for all workers.

        By chrF++: but for the last `BEHIND` looks, however quick the scorer is, so that the same run ends the same way.
        """
        import ray

        config = self.config
        if config.patience is None:
            return False
        if config.keep == "loss":
            return plan.no_better(_dev_losses(history), False, config.patience)
        told = False
        if self.rank == 0:
            looks = list(_dev_losses(history))[:-BEHIND]
            while not set(looks) <= set(scores := ray.get(self.board.scores.remote())):
                ray.get(self.scorer.check.remote())
                time.sleep(WAIT_S)
            told = plan.no_better({step: scores[step] for step in looks}, True, config.patience)
        return self.total(float(told)) > 0

    def total(self, value: float) -> float:
        """The sum of `value` over all workers."""
        import ray.train.torch
        import torch

        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=ray.train.torch.get_device())
        torch.distributed.all_reduce(tensor)
        return tensor.item()


def _packing(model: Any, worker: _Worker, examples: Sequence[Example]) -> bool:
    """Whether examples share a row: as the recipe says, or where this architecture gives the same loss then."""
    mode = worker.config.packing
    if mode is False:
        return False
    problem = why_not_packed(model, examples, worker.text_config, worker.pad)
    if problem is None:
        return True
    if mode is True:
        raise UserError(f"heal.packing: on, but {type(model).__name__} cannot pack: {problem}; set it to auto or off")
    worker.say("one row for each example: this architecture cannot pack them")
    return False


def _engine(model: Any, config: Heal, dtype: str) -> Any:
    """A DeepSpeed engine that adds up gradients until it is told otherwise."""
    import deepspeed
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay),
        config=deepspeed_options(config, dtype),
    )
    return engine


def deepspeed_options(config: Heal, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration; rows add up to a step by gradient accumulation boundaries, not by a fixed count."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": config.zero_stage, **_offload(config)},
        "steps_per_print": 10**9,
    }


def _offload(config: Heal) -> dict[str, Any]:
    parts = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[config.offload]
    return {f"offload_{part}": {"device": "cpu"} for part in parts}


def _run(
    engine: Any, worker: _Worker, batches: Batches, num_steps: int, dev: Sequence[Example], checkpoint: Any | None
) -> None:
    config = worker.config
    looks = plan.looks(num_steps, config.epochs, config.look_every) if dev else frozenset()
    history: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    if checkpoint is not None:
        state = _state(checkpoint)
        history = state["history"]
        others = _other_workers(worker, state)
        best = _load(engine, worker, checkpoint, len(history), batches.of(1) if others else ())
    start = len(history)
    for step in range(start + 1, num_steps + 1):
        if step == start + 1:
            worker.say("learning")
        rate = plan.learning_rate(step, num_steps, config.learning_rate, config.warmup, config.schedule)
        epoch = (step - 1) // (num_steps // config.epochs) + 1
        record = {"step": step, "epoch": epoch, "lr": rate}
        record |= _step(engine, worker, batches.of(step), step, rate)
        # Every worker takes part in gathering weights, or none does.
        if step in looks:
            record["dev_loss"] = _dev_loss(engine, worker, dev)
            least = min(_dev_losses(history).values(), default=float("inf"))
            if config.keep == "loss" and len(looks) > 1 and record["dev_loss"] < least:
                best = _trained(engine, worker)
            if worker.scorer is not None:
                _hand_over(worker, step, _trained(engine, worker))
        history.append(record)
        worker.tell(record)
        last = step == num_steps or (step in looks and worker.enough(history))
        if last or step % config.checkpoint_every == 0 or step in looks:
            final = (_trained(engine, worker) if best is None else best) if last else None
            _report(engine, worker, history, best, final)
        if last:
            return


def _other_workers(worker: _Worker, state: dict[str, Any]) -> bool:
    """Whether the checkpoint's parts of a sharded optimizer are those of another number of workers.

    Raises:
        UserError: they are, and nothing else is kept of it.
    """
    before = state.get("workers", worker.count)
    if before == worker.count or worker.config.zero_stage == 0:
        return False
    if not state.get("portable"):
        raise UserError(
            f"the checkpoint at step {len(state['history'])} is of {before} workers with heal.zero_stage: "
            f"{worker.config.zero_stage}, whose parts do not fit {worker.count}: set heal.workers={before}, or remove "
            f".work in the run directory to begin again (adapters, and zero_stage: 0, go on with any number of workers)"
        )
    return True


def _hand_over(worker: _Worker, step: int, state: dict[str, Any]) -> None:
    """The first worker gives the trained weights to the scorer, and waits until they are written."""
    import ray

    if worker.rank == 0:
        ray.get(worker.scorer.take.remote(step, state))


def _step(engine: Any, worker: _Worker, batch: Sequence[Example], step: int, rate: float) -> dict[str, Any]:
    """One optimiser step; mean loss (nats per target token), what it is made of, target tokens, tokens computed and
    which of them were padding, seconds, and the most bytes of memory this process has held.

    Every token of the batch counts the same, whichever worker and row it is in: the sum over a row is divided by the
    target tokens of the whole batch, and multiplied by the number of workers, over which DeepSpeed takes the mean.
    """
    import torch

    began = time.monotonic()
    torch.manual_seed(worker.config.seed + 1000 * step + worker.rank)  # of dropout; the same after a restart
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    tokens = sum(len(example.target) for example in batch)
    rows = worker.rows(batch)
    weights = worker.config.loss.weights
    totals: dict[str, float] = {}
    for place, row in enumerate(rows):
        engine.set_gradient_accumulation_boundary(place == len(rows) - 1)
        # An empty row still computes, for nothing: the other workers wait in the same collective operations.
        parts = worker.parts(engine, row or batch[:1])
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + (value.item() if row else 0.0)
        loss = sum(weights.get(name, 0.0) * value for name, value in parts.items()) * (1.0 if row else 0.0)
        engine.backward(loss * (worker.count / tokens))
    engine.step()
    means = {name: worker.total(value) / tokens for name, value in totals.items()}
    loss = sum(weights.get(name, 0.0) * value for name, value in means.items())
    if loss != loss:
        raise UserError(f"the loss is not a number at step {step}: lower heal.learning_rate")
    told = means if len(means) > 1 else {}
    computed, padded = (
        int(worker.total(sum(count(row, worker.packed) for row in rows))) for count in (plan.size, plan.padding)
    )
    told |= {"tokens": tokens, "computed": computed, "padding": padded, "memory": _memory()}
    return {"loss": loss, **told, "seconds": round(time.monotonic() - began, 3)}


def _memory() -> int:
    """The most bytes this process has held: of the GPU, or of the machine where there is none."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _dev_loss(engine: Any, worker: _Worker, dev: Sequence[Example]) -> float:
    """Mean loss over all target tokens of the development pairs."""
    import torch

    engine.eval()
    total = 0.0
    with torch.no_grad():
        # As many rows at a time as there are workers, so that short and long ones even out.
        rows = worker.rows(dev)
        for place, row in enumerate(rows):
            loss = worker.loss(engine, row or [dev[0]]).item()
            total += loss if row else 0.0
            worker.say(f"dev {place + 1}/{len(rows)}")
    engine.train()
    return worker.total(total) / sum(len(example.target) for example in dev)


def _dev_losses(history: Sequence[dict[str, Any]]) -> dict[int, float]:
    return {record["step"]: record["dev_loss"] for record in history if "dev_loss" in record}


def _trained(engine: Any, worker: _Worker) -> dict[str, Any]:
    """Copies of the trained weights by name, whole; nothing on workers other than the first."""
    import deepspeed

    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=worker.config.zero_stage == 3):
        if worker.rank != 0:
            return {}
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in named}


def _report(
    engine: Any,
    worker: _Worker,
    history: list[dict[str, Any]],
    best: dict[str, Any] | None,
    final: dict[str, Any] | None,
) -> None:
    """Hands a checkpoint to Ray Train: every worker its part of the engine's state, the first one the rest."""
    import ray.train
    from safetensors.torch import save_file

    # Of adapters, which are small, the optimizer's whole state is kept too.
    portable = worker.config.zero_stage > 0 and worker.config.method != "full" and final is None
    whole_state = gather(engine, worker.rank == 0) if portable else {}
    with tempfile.TemporaryDirectory(dir=worker.scratch) as scratch:
        directory = Path(scratch)
        engine.save_checkpoint(str(directory), tag=TAG, exclude_frozen_parameters=True)
        if worker.rank == 0:
            if portable:
                save_file(whole_state, directory / PORTABLE)
            if best:
                save_file(best, directory / BEST)
            if final is not None:
                save_trained(engine.module, final, directory)
            state = {"finished": final is not None, "workers": worker.count, "portable": portable, "history": history}
            (directory / STATE).write_text(json.dumps(state))
        whole = ray.train.Checkpoint.from_directory(directory) if any(directory.iterdir()) else None
        ray.train.report({"step": history[-1]["step"], "loss": history[-1]["loss"]}, checkpoint=whole)


def _step_nowhere(engine: Any, worker: _Worker, row: Sequence[Example]) -> None:
    """A step of no gradient at a rate of nothing, in which the optimizer makes its state."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(sum(worker.parts(engine, row).values()) * 0.0)
    engine.step()


def _state(checkpoint: Any) -> dict[str, Any]:
    with checkpoint.as_directory() as directory:
        return json.loads((Path(directory) / STATE).read_text())


def _load(
    engine: Any, worker: _Worker, checkpoint: Any, steps: int, example: Sequence[Example]
) -> dict[str, Any] | None:
    """Puts the engine where it was after so many steps; the weights of the best epoch so far, if they are another's.

    `example`: where the checkpoint is of another number of workers, something to make the optimizer's state with.
    """
    from safetensors.torch import load_file

    with checkpoint.as_directory() as directory:
        if example:
            _step_nowhere(engine, worker, example[:1])
            scatter(engine, load_file(Path(directory) / PORTABLE), steps)
        else:
            engine.load_checkpoint(directory, tag=TAG, load_module_strict=False)
        best = Path(directory) / BEST
        return load_file(best) if best.exists() else None
