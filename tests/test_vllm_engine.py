"""vLLM and transformers say the same, whole and without layers. The engines run in a Ray worker, as in a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy

from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.generate.base import Output, Request
from raylp.generate.pool import Worker
from raylp.generate.transformers_view import TransformersGenerator
from raylp.models.checkpoint import save_checkpoint
from raylp.models.load import load_model, load_tokenizer

Translate = Callable[..., list[Output]]


@pytest.fixture(scope="module")
def worker(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import ray

    worker = ray.remote(Worker).options(num_cpus=1).remote(1, True, str(tmp_path_factory.mktemp("logs")))
    yield worker
    ray.kill(worker)


@pytest.fixture(scope="module")
def on_vllm(worker: Any) -> Translate:
    """Outputs of a vLLM engine in a worker of its own; another model replaces the one before it."""
    import ray
    from ray.exceptions import RayTaskError

    def translate(path: Path, requests: list[Request], removed: Any = (), skippable: bool = True) -> list[Output]:
        try:
            return ray.get(worker.translate.remote(str(path), "vllm", "float32", requests, removed, skippable))[0]
        except RayTaskError as error:
            raise error.cause from None

    return translate


def toy_requests(tokenizer: Any, count: int) -> list[Request]:
    prompt = Prompt(template=toy.TOY_TEMPLATE)
    rows = toy.toy_splits()["test"][:count]
    return prompt.requests(tokenizer, [(row["source"], "xx-yy") for row in rows])


def on_transformers(path: Path, requests: list[Request], removed: Any = ()) -> list[Output]:
    return TransformersGenerator(load_model(path), load_tokenizer(path)).generate(requests, removed)


SETS = [(), toy.TRUTH.answers[0], (0,), (toy.TRUTH.num_layers - 1,), tuple(range(1, toy.TRUTH.num_layers)), ()]


@pytest.mark.slow
def test_same_tokens_without_any_layers(on_vllm: Translate, toy_checkpoint: Path) -> None:
    requests = toy_requests(load_tokenizer(toy_checkpoint), 12)
    outputs = [on_vllm(toy_checkpoint, requests, removed) for removed in SETS]
    assert outputs == [on_transformers(toy_checkpoint, requests, removed) for removed in SETS]
    # The sets are told apart, a translation is among them, and nothing of one set is left in the next.
    assert len({tuple(o.tokens for o in found) for found in outputs}) >= 3
    targets = [row["target"] for row in toy.toy_splits()["test"][:12]]
    assert [o.text for o in outputs[0]] == [o.text for o in outputs[-1]] == targets


@pytest.mark.slow
def test_skipped_is_pruned(on_vllm: Translate, toy_checkpoint: Path, tmp_path: Path) -> None:
    requests = toy_requests(load_tokenizer(toy_checkpoint), 12)
    removed = [1, *toy.TRUTH.dead]
    skipped = on_vllm(toy_checkpoint, requests, removed)
    pruned = tmp_path / "pruned"
    save_checkpoint(load_model(toy_checkpoint), toy_checkpoint, pruned, {}, removed)
    assert on_vllm(pruned, requests, skippable=False) == skipped

    with pytest.raises(UserError, match="not started to leave layers out"):
        on_vllm(pruned, requests, [0], skippable=False)
    with pytest.raises(UserError, match="may take 300 tokens, the engine holds 256"):
        on_vllm(pruned, [Request((5,) * 290, 10)], skippable=False)
    assert on_vllm(pruned, requests, skippable=False) == skipped, "the engine is none the worse for wrong requests"


@pytest.mark.slow
def test_mistrals_own_files_beside_are_not_read(on_vllm: Translate, toy_checkpoint: Path, tmp_path: Path) -> None:
    both = toy.with_mistrals_own(toy_checkpoint, tmp_path / "both")
    requests = toy_requests(load_tokenizer(toy_checkpoint), 4)
    assert on_vllm(both, requests, skippable=False) == on_transformers(toy_checkpoint, requests)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "cohere"])
def test_every_form_of_layer(on_vllm: Translate, kind: str) -> None:
    """GPT-2's layers give hidden states alone, Gemma's a residual besides, Cohere's one that means nothing."""
    path = toy.tiny_random(kind)
    requests = [Request(r.tokens, 10) for r in toy_requests(load_tokenizer(path), 4)]
    for removed in ((), (0, 3), (5,)):
        assert on_vllm(path, requests, removed) == on_transformers(path, requests, removed), removed


@pytest.mark.slow
def test_the_quicker_backend_is_chosen(worker: Any, toy_checkpoint: Path) -> None:
    import ray

    requests = toy_requests(load_tokenizer(toy_checkpoint), 4)
    choice = ray.get(worker.choose_backend.remote(str(toy_checkpoint), "float32", requests, [(), (1,)]))
    assert set(choice.seconds) == {"transformers", "vllm"} and not choice.problems
    assert choice.backend == min(choice.seconds, key=choice.seconds.get) and f"{choice.backend} " in choice.text()

    # vLLM refuses Qwen 2 with layers of two kinds.
    mixed = toy.tiny_random("qwen2_sliding")
    choice = ray.get(worker.choose_backend.remote(str(mixed), "float32", requests, [(), (1,)]))
    assert choice.backend == "transformers" and list(choice.seconds) == ["transformers"]
    assert "vLLM cannot load it" in choice.problems["vllm"] and "vllm cannot: " in choice.text()
