"""Healing: rows that share a prompt, shares that add up, and training through Ray Train and DeepSpeed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import toy
from conftest import toy_recipe
from hypothesis import given
from hypothesis import strategies as st

from raylp.context import Context, Splits
from raylp.data.corpus import Pair, read_pairs
from raylp.data.prompt import Prompt
from raylp.data.tokens import Example
from raylp.errors import UserError
from raylp.heal import plan
from raylp.heal.config import Heal
from raylp.heal.disk import checkpoint_bytes, trained_parameters
from raylp.heal.examples import choose, tokenise
from raylp.heal.loop import _packing, _Worker, is_out_of_memory
from raylp.heal.pack import loss_sum, pack, packed_length
from raylp.heal.stage import LOOKS, WORK, _clear, adapting, heal, heal_model
from raylp.heal.trainable import make_trainable, merge, save_trained
from raylp.metrics.ngram import metric
from raylp.models.checkpoint import card_for, count_parameters, read_card, save_checkpoint
from raylp.models.load import load_model, stored_dtype
from raylp.models.stack import find_stack, text_config
from raylp.pipeline import STAGES, depends_on, open_context, read_splits
from raylp.progress import Reporter
from raylp.recipe import parse_recipe
from raylp.rundir import RunDir

# Longer than the tiny models' sliding windows, so that a window by place instead of position would show.
PREFIX = tuple(range(20, 44))


def random_examples(count: int, seed: int = 0, pairs: int = 2) -> list[Example]:
    """Prompts of a language pair begin alike, and differ in length."""
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        pair = number % pairs
        prompt = (1, 10 + pair, *PREFIX, *(rng.randrange(20, 200) for _ in range(rng.randrange(1, 12))))
        examples.append(
            Example(prompt, tuple(rng.randrange(20, 200) for _ in range(rng.randrange(1, 9))), f"en-{pair}")
        )
    return examples


def loss_alone(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """The plain way: the whole text through the model, cross-entropy of the target's tokens."""
    tokens = torch.tensor([(*example.prompt, *example.target)])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(example.target), reduction="sum")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gemma3", "cohere2"])
def test_packing_changes_neither_loss_nor_gradient(kind: str) -> None:
    model = load_model(toy.tiny_random(kind), "float32").double()
    watched = [p for name, p in model.named_parameters() if "q_proj" in name or "down_proj" in name or "norm" in name]
    watched = [p.requires_grad_(True) for p in watched]
    examples = random_examples(6)
    apart = sum(loss_alone(model, example) for example in examples)
    wanted = torch.autograd.grad(apart, watched, allow_unused=True)
    for packed in (True, False):
        loss = loss_sum(model, examples, text_config(model), packed)
        assert loss.item() == pytest.approx(apart.item(), rel=1e-7)
        for found, right in zip(torch.autograd.grad(loss, watched, allow_unused=True), wanted, strict=True):
            assert (found is None) == (right is None)
            if found is not None:
                torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)  # norms are float32


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "cohere2", "mixtral", "phi3", "gpt2", "opt"])
def test_packing_is_exact_in_float32(kind: str) -> None:
    model = load_model(toy.tiny_random(kind), "float32")
    examples = random_examples(5)
    with torch.no_grad():
        apart = sum(loss_alone(model, example) for example in examples).item()
        packed = loss_sum(model, examples, text_config(model), True).item()
    assert packed == pytest.approx(apart, rel=1e-5)


def test_rounded_products_do_not_pass_for_a_model_that_cannot_pack() -> None:
    model = load_model(toy.tiny_random("gemma3_text"), "float32").requires_grad_(False)
    model.get_output_embeddings().weight.mul_(10)  # so that rounding shows (where the processor has bfloat16 units)
    worker = _Worker(1, 1, Heal(matmul="bfloat16"), None)
    worker.text_config = text_config(model)
    torch.set_float32_matmul_precision("medium")
    try:
        assert _packing(model, worker, random_examples(4, pairs=1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_prompts_share_a_row_only_within_their_pair() -> None:
    examples = [
        Example((1, 2, 3, 4), (9, 8), "en-de"),
        Example((1, 2, 7), (6,), "en-cs"),
        Example((1, 2, 3, 5), (7,), "en-de"),
    ]
    row = pack(examples)
    assert row.tokens == [1, 2, 3, 4, 9, 5, 1, 2, 7]
    assert row.positions == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert [row.tokens[place] for place in row.predict] == [4, 9, 5, 7]
    assert row.targets == [9, 8, 7, 6]


@given(st.integers(1, 40), st.integers(0, 10**6), st.integers(1, 3))
def test_the_length_of_a_row_is_known_before_it_is_made(count: int, seed: int, pairs: int) -> None:
    examples = random_examples(count, seed, pairs)
    assert packed_length(examples) == len(pack(examples).tokens) <= sum(example.length for example in examples)


@given(st.integers(1, 100), st.integers(1, 16), st.integers(1, 4), st.integers(0, 9))
def test_every_epoch_has_every_example_once(count: int, batch_size: int, epochs: int, seed: int) -> None:
    batches = plan.steps(count, batch_size, epochs, seed)
    assert batches == plan.steps(count, batch_size, epochs, seed)
    per_epoch = math.ceil(count / batch_size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        seen = [i for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for i in batch]
        assert sorted(seen) == list(range(count))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(16, 300), st.booleans(), st.integers(0, 10**6))
def test_shares_are_whole_and_in_lockstep(count: int, workers: int, row_tokens: int, packed: bool, seed: int) -> None:
    examples = random_examples(count, seed)
    shares = plan.divide(range(count), examples, workers, row_tokens, packed)
    assert len(shares) == workers
    assert len({len(rows) for rows in shares}) == 1
    assert sorted(i for rows in shares for row in rows for i in row) == list(range(count))
    for row in (row for rows in shares for row in rows if len(row) > 1):
        size = (
            len(pack([examples[i] for i in row]).tokens) if packed else len(row) * max(examples[i].length for i in row)
        )
        assert size <= row_tokens


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_then_falls(schedule: str) -> None:
    rates = [plan.learning_rate(step, 100, 1e-3, 0.1, schedule) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(1e-3) and min(rates) > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[-1] < 2e-5) == (schedule != "constant")
    assert plan.learning_rate(1, 1, 1e-3, 0.0, schedule) == 1e-3


def test_what_is_learned_from() -> None:
    authentic = [Pair(str(i), f"source {i}", f"target {i}", "en-de") for i in range(3)]
    teacher = [
        {"id": "0", "source": "source 0", "translation": "target 0", "pair": "en-de", "kept": True},
        {"id": "1", "source": "source 1", "translation": "other 1", "pair": "en-de", "kept": True},
        {"id": "2", "source": "source 2", "translation": "", "pair": "en-de", "kept": False},
    ]
    shown = {"en-de": [("Source 2!", "target 2")]}

    def targets(data: str) -> list[str]:
        return [pair.target for pair in choose(authentic, teacher, data, shown)]

    assert targets("authentic") == ["target 0", "target 1"]
    assert targets("teacher") == ["target 0", "other 1"]
    assert targets("both") == ["target 0", "target 1", "other 1"]


@pytest.mark.parametrize(("share", "counts"), [(0.5, (20, 20)), (0.8, (5, 20)), (0.1, (60, 7))])
def test_authentic_and_teacher_data_are_mixed_by_a_share(share: float, counts: tuple[int, int]) -> None:
    authentic = [Pair(str(i), f"s{i}", f"t{i}", "xx-yy") for i in range(60)]
    teacher = [
        {"id": str(i), "source": f"s{i}", "translation": f"u{i}", "pair": "xx-yy", "kept": True} for i in range(20)
    ]
    found = choose(authentic, teacher, "both", {}, share)
    assert tuple(sum(pair.id.startswith("teacher:") is taught for pair in found) for taught in (False, True)) == counts
    assert found == choose(authentic, teacher, "both", {}, share)
    assert len(choose(authentic, teacher, "both", {})) == 80


@given(st.integers(1, 200), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 60)))
def test_looks_are_regular_and_the_last_step_is_one(per_epoch: int, epochs: int, every: int | None) -> None:
    steps = per_epoch * epochs
    looks = plan.looks(steps, epochs, every)
    assert max(looks) == steps and min(looks) >= 1
    assert looks - {steps} == {step for step in range(1, steps) if step % (every or per_epoch) == 0}


def test_training_ends_when_looks_are_no_better() -> None:
    losses = {10: 2.0, 20: 1.5, 30: 1.6, 40: 1.5}
    assert plan.best_look(losses, False) == 20 and plan.best_look({1: 30.0, 2: 41.0, 3: 41.0}, True) == 2
    assert plan.no_better(losses, False, 2)
    assert not plan.no_better(losses, False, 3) and not plan.no_better(losses, False, None)
    assert not plan.no_better({}, True, 1)


def test_rows_that_cannot_be_packed_have_little_padding() -> None:
    rng = random.Random(3)
    examples = [Example(tuple(range(rng.randrange(5, 200))), (1, 2, 3), "en-de") for _ in range(64)]
    rows = [[examples[i] for i in row] for share in plan.divide(range(64), examples, 2, 10**6, False) for row in share]
    assert sum(len(row) for row in rows) == 64
    assert sum(plan.padding(row, False) for row in rows) <= 0.05 * sum(plan.size(row, False) for row in rows)
    assert any(len(row) > 1 for row in rows) and plan.padding(examples, True) == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_disk_for_checkpoints_is_known_before_the_start(method: str) -> None:
    source = toy.tiny_random("gemma3_text")
    heal = Heal(method=method, keep="last")
    learned = sum(p.numel() for p in make_trainable(load_model(source), heal).parameters() if p.requires_grad)
    assert trained_parameters(source, heal) == pytest.approx(learned, rel=0.02)
    assert checkpoint_bytes(source, heal) == 64 * trained_parameters(source, heal)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_want_of_memory_is_seen(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(f"{type(error).__name__}: {error}") is is_one


def test_a_mixture_is_not_trained_over_4_bits(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    """Its experts would stay as they are."""
    mixture = toy.tiny_random("mixtral")
    recipe = parse_recipe(toy_recipe(mixture, toy_data, tmp_path / "run", heal={"method": "qlora", "when": "before"}))
    with pytest.raises(UserError, match="qlora leaves a mixture's experts"):
        open_context(recipe, Reporter(quiet=True))


def test_what_other_trainings_of_a_model_left_is_cleared_away(tmp_path: Path) -> None:
    rundir = RunDir(str(tmp_path / "run"))
    theirs = ("healed-14-w8a8-0123456789ab", "baseline-healed-14-0123456789ab")
    for name in ("healed-14-0123456789ab", "healed-14-ba9876543210", *theirs):
        for place in (WORK, LOOKS):
            rundir.write_text(f"{place}/{name}/checkpoint", "x")
    _clear(rundir, "healed-14", "healed-14-ba9876543210")
    assert rundir.names(WORK) == rundir.names(LOOKS) == sorted(("healed-14-ba9876543210", *theirs))
    _clear(rundir, "healed-14")
    assert rundir.names(WORK) == rundir.names(LOOKS) == sorted(theirs)


def test_adapting_needs_no_teacher() -> None:
    stored = {"cross_entropy": 1, "distillation": 1, "teacher": "stored"}
    config = adapting(Heal.model_validate({"when": "both", "teacher_share": 0.5, "loss": stored}))
    assert Heal.model_validate(config.model_dump()) == config
    authentic = [Pair("1", "a", "b", "xx-yy")]
    assert choose(authentic, [], config.data, {}, config.teacher_share, config.loss.stored) == authentic


def test_where_both_say_the_same_the_one_with_probabilities_stays() -> None:
    authentic = [Pair("1", "a", "b", "xx-yy"), Pair("2", "c", "d", "xx-yy")]
    teacher = [{"id": "1", "source": "a", "translation": "b", "pair": "xx-yy", "kept": True}]
    assert [pair.id for pair in choose(authentic, teacher, "both", {})] == ["1", "2"]
    assert [pair.id for pair in choose(authentic, teacher, "both", {}, None, True)] == ["teacher:1", "2"]


def test_long_examples_are_left_out_not_cut() -> None:
    tokenizer = toy.toy_tokenizer()
    pairs = [Pair("a", "nefi tetu", "sivi", "xx-yy"), Pair("b", " ".join(["nefi"] * 50), "sivi", "xx-yy")]
    examples = tokenise(pairs, Prompt(template=toy.TOY_TEMPLATE), tokenizer, 20)
    assert len(examples) == 1
    assert tokenizer.decode([*examples[0].prompt, *examples[0].target]) == "nefi tetu = sivi\n"


def test_gradients_of_shares_add_up(tmp_path: Path) -> None:
    """Row sums / tokens of the batch x workers, and the mean over workers: the gradient of the mean loss."""
    model = load_model(toy.tiny_random("llama"), "float32").double()
    watched = [p.requires_grad_(True) for name, p in model.named_parameters() if "q_proj" in name]
    examples = random_examples(7)
    tokens = sum(len(example.target) for example in examples)
    wanted = torch.autograd.grad(sum(loss_alone(model, e) for e in examples) / tokens, watched)
    shares = plan.divide(range(7), examples, 3, 60, True)
    total = [torch.zeros_like(p) for p in watched]
    for rows in shares:
        for row in rows:
            loss = loss_sum(model, [examples[i] for i in row] or examples[:1], model.config, True) * bool(row)
            for sum_, gradient in zip(total, torch.autograd.grad(loss * (3 / tokens), watched), strict=True):
                sum_ += gradient / 3
    for found, right in zip(total, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma3", "cohere2", "mixtral"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_merged_checkpoint_says_what_the_trained_model_says(kind: str, method: str, tmp_path: Path) -> None:
    source = toy.tiny_random(kind)
    before = load_model(source)
    model = make_trainable(load_model(source), Heal(method=method))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and not any("vision" in name or "embed" in name or "lm_head" in name for name in names)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    (tmp_path / "trained").mkdir()
    save_trained(model, state, tmp_path / "trained")
    merge(source, tmp_path / "trained", tmp_path / "merged", {"schema": 1, "stack": ""})
    merged = load_model(tmp_path / "merged")
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in before.named_parameters()}
    assert count_parameters(tmp_path / "merged") == count_parameters(source)
    tokens = torch.tensor([random_examples(1)[0].prompt])
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    said = model.eval().generate(input_ids=tokens, **options).tolist()
    assert merged.generate(input_ids=tokens, **options).tolist() == said
    assert before.generate(input_ids=tokens, **options).tolist() != said
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert read_card(tmp_path / "merged") == {"schema": 1, "stack": find_stack(before).path}


# --- through Ray Train and DeepSpeed ---

REMOVED = [1, *toy.TRUTH.dead]
HEAL = {"learning_rate": 3e-3, "epochs": 2, "batch_size": 16, "checkpoint_every": 4, "row_tokens": 90}


def make_context(run_dir: Path, files: dict[str, Path], **section: object) -> Context:
    """A run whose pruned model has lost a layer that it needs."""
    model = toy.toy_model()
    taught = {"distill": {}} if section.get("data") == "teacher" else {}
    sections = {"search": {"given": [1]}, "heal": {**HEAL, **section}, **taught}
    recipe = parse_recipe(toy_recipe(model, files, run_dir, **sections))
    pairs = {split: read_pairs(file, "xx-yy") for split, file in files.items()}
    splits = Splits(pairs["search"], pairs["train"], pairs["dev"], {"xx-yy": pairs["test"]})
    prompt = Prompt(template=toy.TOY_TEMPLATE)
    context = Context(recipe, RunDir(str(run_dir)), splits, prompt, model, "float32", Reporter(quiet=True))
    if not context.rundir.complete("models/pruned-5"):
        card = card_for(str(model), "0", "model.layers", REMOVED, prompt.model_dump())
        with context.rundir.building("models/pruned-5") as target:
            save_checkpoint(load_model(model), model, target, card, REMOVED)
    return context


def records(run_dir: Path, name: str = "healed-5") -> list[dict]:
    return [json.loads(line) for line in (run_dir / "heal" / f"{name}.jsonl").read_text().splitlines()]


def right(model: Path, data: dict[str, Path]) -> float:
    """Share of test sentences translated as the reference has it."""
    rows = read_pairs(data["test"], "xx-yy")
    said = toy.translate(load_model(model), [row.source for row in rows])
    return sum(text == row.target for text, row in zip(said, rows, strict=True)) / len(rows)


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory, toy_data: dict[str, Path], ray_session: None) -> Path:
    """The run directory of a model healed by two workers with sharded gradients."""
    run = tmp_path_factory.mktemp("healed")
    context = make_context(run, toy_data, workers=2, zero_stage=2)
    heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    return run


@pytest.mark.slow
def test_healing_brings_translations_back(healed: Path, toy_data: dict[str, Path]) -> None:
    steps = records(healed)
    assert [record["step"] for record in steps] == list(range(1, 27))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert [record["step"] for record in steps if "dev_loss" in record] == [13, 26]
    before, after = right(healed / "models" / "pruned-5", toy_data), right(healed / "models" / "healed-5", toy_data)
    assert after > before + 0.2
    model = healed / "models" / "healed-5"
    assert read_card(model) == read_card(healed / "models" / "pruned-5")
    assert stored_dtype(model) == "float32"
    assert count_parameters(model) == count_parameters(healed / "models" / "pruned-5")
    assert not list((healed / ".work" / "heal").iterdir()), "nothing is left of the work"


@pytest.mark.slow
def test_what_is_healed_is_not_healed_again(healed: Path, toy_data: dict[str, Path]) -> None:
    """A driver that died over the second model finds the first one as it was."""
    context = make_context(healed, toy_data, workers=2, zero_stage=2)
    weights = healed / "models" / "healed-5" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    found = heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    assert found["steps"] == 26 and found["loss"] == records(healed)[-1]["loss"]
    assert weights.stat().st_mtime_ns == before and not list((healed / ".work" / "heal").iterdir())


def kill_training_worker(checkpoints: Path, killed: list[int]) -> None:
    """As soon as a checkpoint is there, one of this process's training workers dies without a word."""
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("*/checkpoint_*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in psutil.process_iter(["cmdline"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
            killed.append(process.pid)
            process.kill()
            return


@pytest.mark.slow
def test_one_worker_that_dies_learns_the_same(
    healed: Path, toy_data: dict[str, Path], tmp_path: Path, ray_session: None
) -> None:
    """Neither the number of workers and rows nor a crash changes a step: normalisation, order and state all hold."""
    context = make_context(tmp_path, toy_data, workers=1, zero_stage=0, row_tokens=2048)
    killed: list[int] = []
    assassin = threading.Thread(target=kill_training_worker, args=(tmp_path / ".work" / "heal", killed))
    assassin.start()
    heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    assassin.join()
    assert killed
    ours, theirs = records(tmp_path), records(healed)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert (mine["tokens"], mine["lr"]) == (other["tokens"], other["lr"])
    assert ours[-1]["dev_loss"] == pytest.approx(theirs[-1]["dev_loss"], rel=1e-3)


@pytest.mark.slow
def test_the_unpruned_model_teaches(toy_data: dict[str, Path], tmp_path: Path, ray_session: None) -> None:
    """Its words and its states, beside the targets; weights shared out over two workers."""
    weights = {"cross_entropy": 0.5, "distillation": 1.0, "hidden": 2.0}
    context = make_context(tmp_path, toy_data, workers=2, zero_stage=3, epochs=1, loss=weights)
    heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    steps = records(tmp_path)
    for name in weights:
        assert steps[-1][name] < 0.8 * steps[0][name], name
    for record in steps:
        assert record["loss"] == pytest.approx(sum(weight * record[name] for name, weight in weights.items()))
    before, after = (right(tmp_path / "models" / name, toy_data) for name in ("pruned-5", "healed-5"))
    assert after > before + 0.1


@pytest.mark.slow
def test_the_best_look_by_chrf_is_kept_and_ends_the_training(
    toy_data: dict[str, Path], tmp_path: Path, ray_session: None
) -> None:
    """An actor translates dev beside the training; what it found best is what is merged."""
    context = make_context(tmp_path, toy_data, epochs=6, keep="chrF++", look_every=5, patience=2)
    found = heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    scores = {record["step"]: record["dev_chrf"] for record in records(tmp_path) if "dev_chrf" in record}
    assert len(scores) >= 3 and found["dev_chrf"] == max(scores.values()) == scores[found["kept"]]
    assert found["kept"] == plan.best_look(scores, True)
    assert found["steps"] < 6 * 13 and found["steps"] % 5 == 0, "it ended by itself"
    assert plan.no_better({step: score for step, score in scores.items() if step < found["steps"]}, True, 2)
    rows = read_pairs(toy_data["dev"], "xx-yy")
    said = toy.translate(load_model(tmp_path / "models" / "healed-5"), [row.source for row in rows])
    chrf = metric("chrF2++")
    assert chrf.score(chrf.statistics(said, [row.target for row in rows]).sum(0)) == pytest.approx(found["dev_chrf"])
    assert not [place for place in ("heal", "heal-looks") if list((tmp_path / ".work" / place).iterdir())]


def test_dev_is_asked_for_before_the_start(toy_data: dict[str, Path], tmp_path: Path) -> None:
    without = {split: file for split, file in toy_data.items() if split != "dev"}
    heal = {"patience": 2, "look_every": 4}
    recipe = parse_recipe(toy_recipe(toy.toy_model(), without, tmp_path, search={"remove": 1}, heal=heal))
    with pytest.raises(UserError, match="heal needs a dev split"):
        read_splits(recipe)
    first = recipe.model_copy(update={"heal": Heal.model_validate({**heal, "when": "before"})})
    with pytest.raises(UserError, match="adapt needs a dev split"):
        read_splits(first)
    adapt = next(stage for stage in STAGES if stage.name == "adapt")
    assert depends_on(adapt, recipe) == ("train", "dev"), "another dev text may choose other weights"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, toy_data: dict[str, Path], ray_session: None) -> Path:
    """The run directory of a model healed by one worker in the plainest way, for an epoch."""
    run = tmp_path_factory.mktemp("plain")
    context = make_context(run, toy_data, epochs=1)
    heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2, "zero_stage": 3, "offload": "all"},
        {"zero_stage": 1, "offload": "optimizer", "gradient_checkpointing": True, "packing": "off"},
    ],
    ids=["two workers share the weights", "offloaded, computed twice, padded"],
)
def test_how_it_is_computed_changes_nothing(
    plain: Path, toy_data: dict[str, Path], tmp_path: Path, options: dict[str, object]
) -> None:
    """The same loss at every step to 1e-4, and the same checkpoint."""
    context = make_context(tmp_path, toy_data, epochs=1, **options)
    heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    for mine, other in zip(records(tmp_path), records(plain), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
    ours, theirs = (dict(load_model(run / "models" / "healed-5").named_parameters()) for run in (tmp_path, plain))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_adapters_over_four_bits_heal_the_weights_as_they_were(
    toy_data: dict[str, Path], tmp_path: Path, ray_session: None
) -> None:
    context = make_context(tmp_path, toy_data, method="qlora", lora={"rslora": True})
    heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
    steps = records(tmp_path)
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    before, after = (right(tmp_path / "models" / name, toy_data) for name in ("pruned-5", "healed-5"))
    assert after > before + 0.2
    ours, whole = (dict(load_model(tmp_path / "models" / n).named_parameters()) for n in ("healed-5", "pruned-5"))
    for name in ours:
        if "norm" in name or "embed" in name:
            assert torch.equal(ours[name], whole[name]), "not rounded to four bits"


def test_healing_without_data_says_what_is_missing(toy_data: dict[str, Path], tmp_path: Path) -> None:
    context = make_context(tmp_path, toy_data, data="teacher")
    with pytest.raises(UserError, match="no teacher data; run 'raylp distill' first"):
        heal(context)
    context = make_context(tmp_path, toy_data, data="authentic")
    context.splits.train.clear()
    with pytest.raises(UserError, match="nothing to learn from"):
        heal(context)


DRIVER = """
import json, sys
from pathlib import Path
from test_heal import REMOVED, make_context
from raylp.heal.stage import heal_model
run, data = Path(sys.argv[1]), {k: Path(v) for k, v in json.loads(sys.argv[2]).items()}
context = make_context(run, data, **json.loads(sys.argv[3]))
heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
"""


def driver(run: Path, data: dict[str, Path], script: str = DRIVER, **section: object) -> subprocess.Popen:
    """A process that heals in `run`, with a Ray of its own."""
    files = json.dumps({split: str(file) for split, file in data.items()})
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-c", script, str(run), files, json.dumps(section)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Waits for the end of such a process, which must be a good one."""
    told = process.communicate(timeout=600)[1]
    # Ray prints the workers' lines after the exception.
    assert process.returncode == 0, told[max(told.rfind("Traceback"), 0) :]


def killed_on_the_way(run: Path, data: dict[str, Path], **section: object) -> list[dict]:
    """Kills such a process as soon as Ray Train knows of a checkpoint; the steps that the last such one holds."""
    first = driver(run, data, **section)
    deadline = time.monotonic() + 400
    work = run / ".work" / "heal"

    def known() -> list[dict]:
        """States of the checkpoints that Ray Train has noted: it goes on with no other."""
        noted = "".join(file.read_text() for file in work.glob("*/checkpoint_manager_snapshot.json"))
        states = [file for file in work.glob("*/checkpoint_*/state.json") if f'"{file.parent.name}"' in noted]
        return [json.loads(state.read_text()) for state in states]

    while not known() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    states = known()
    assert states and not any(state["finished"] for state in states), "it was killed in the middle"
    return max((state["history"] for state in states), key=len)


@pytest.mark.faults
def test_a_killed_driver_goes_on_at_its_last_checkpoint(
    healed: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    """With another number of workers, in other portions: neither changes a step."""
    kept = killed_on_the_way(tmp_path, toy_data)
    finish(driver(tmp_path, toy_data, workers=2, row_tokens=500, checkpoint_every=7))
    steps = records(tmp_path)
    assert steps[: len(kept)] == kept, "steps before the checkpoint were not computed again"
    assert [record["step"] for record in steps] == list(range(1, 27))
    for mine, other in zip(steps, records(healed), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.faults
@pytest.mark.parametrize(("stage", "before", "after"), [(2, 2, 1), (3, 1, 2)])
def test_adapters_whose_optimizer_is_shared_out_go_on_with_another_number_of_workers(
    stage: int, before: int, after: int, healed: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    kept = killed_on_the_way(tmp_path, toy_data, workers=before, zero_stage=stage)
    finish(driver(tmp_path, toy_data, workers=after, zero_stage=stage))
    steps = records(tmp_path)
    assert steps[: len(kept)] == kept and [record["step"] for record in steps] == list(range(1, 27))
    for mine, other in zip(steps, records(healed), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.faults
def test_sharded_checkpoints_of_all_weights_ask_for_their_number_of_workers(
    toy_data: dict[str, Path], tmp_path: Path
) -> None:
    killed_on_the_way(tmp_path, toy_data, workers=2, zero_stage=2, method="full")
    second = driver(tmp_path, toy_data, workers=1, zero_stage=2, method="full")
    told = second.communicate(timeout=600)[1]
    assert second.returncode == 1
    assert "is of 2 workers with heal.zero_stage: 2" in told and "set heal.workers=2" in told


@pytest.mark.faults
def test_looks_at_dev_survive_a_killed_driver(toy_data: dict[str, Path], tmp_path: Path) -> None:
    """Weights that were handed over and not yet translated are, by the next start; none is translated differently."""
    section = {"keep": "chrF++", "look_every": 4, "checkpoint_every": 3}
    runs = [tmp_path / name for name in ("killed", "undisturbed")]
    killed_on_the_way(runs[0], toy_data, **section)
    for run in runs:
        finish(driver(run, toy_data, **section))
    told, whole = ({r["step"]: r["dev_chrf"] for r in records(run) if "dev_chrf" in r} for run in runs)
    assert list(told) == [4, 8, 12, 16, 20, 24, 26]
    assert told == pytest.approx(whole, abs=1e-6)
    kept = [json.loads((run / "heal" / "healed-5.json").read_text())["kept"] for run in runs]
    assert kept[0] == kept[1]


NODES = """
import json, os, sys, threading, time
from pathlib import Path
import psutil
import ray
from ray.cluster_utils import Cluster
from test_heal import REMOVED, make_context
from raylp.heal.stage import heal_model
run, data = Path(sys.argv[1]), {k: Path(v) for k, v in json.loads(sys.argv[2]).items()}
# Connected before there are other nodes, so that the driver is on the head.
cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0})
os.environ["RAY_ADDRESS"] = cluster.address  # also for what Ray's own processes join
nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
cluster.wait_for_nodes()
gone = []

def works(node):
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("RayTrainWorker" in " ".join(child.cmdline()) for child in raylet.children(recursive=True))

def take_away():
    while not list(run.glob(".work/heal/*/checkpoint_*/state.json")):
        time.sleep(0.05)
    node = next(filter(works, nodes))
    cluster.remove_node(node, allow_graceful=False)
    gone.append(node)

threading.Thread(target=take_away, daemon=True).start()
context = make_context(run, data, **json.loads(sys.argv[3]))
heal_model(context, context.rundir.local("models/pruned-5"), "healed-5", "after pruning", REMOVED)
assert gone, "a node was lost"
# At its exit the cluster's processes would go first, and a driver whose node is gone ends with 1.
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.faults
def test_a_lost_nodes_worker_starts_again_on_another(healed: Path, toy_data: dict[str, Path], tmp_path: Path) -> None:
    """Two of three nodes have a worker each; one of them is taken away in the middle."""
    finish(driver(tmp_path, toy_data, NODES, workers=2, zero_stage=2, checkpoint_every=2))
    for mine, other in zip(records(tmp_path), records(healed), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
