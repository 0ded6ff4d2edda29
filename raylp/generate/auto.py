"""Backend `auto`: both are timed on a few sentences, and the quicker one is taken."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylp.errors import UserError
from raylp.generate.base import Generator, Request

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Choice:
    """`backend`: the one to take. `seconds`: of each that could be timed; `problems`: why the others could not."""

    backend: str
    seconds: dict[str, float]
    problems: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """One line for the log."""
        parts = [f"{name} {self.seconds[name]:.2f} s" for name in sorted(self.seconds, key=self.seconds.__getitem__)]
        parts += [f"{name} cannot: {problem}" for name, problem in self.problems.items()]
        return f"backend {self.backend}: {'; '.join(parts)}"


def choose_backend(
    load: Callable[[str], Generator],
    requests: Sequence[Request],
    removed_sets: Sequence[Sequence[int]] = ((),),
    backends: Sequence[str] = BACKENDS,
) -> Choice:
    """Times every backend over all of `removed_sets`, after one warm-up pass over the first of them.

    `load(backend)` makes the generator; each is closed before the next is loaded. Loading is not counted: a search
    loads once.

    Raises:
        UserError: no backend can; with the reason of each.
    """
    seconds: dict[str, float] = {}
    problems: dict[str, str] = {}
    for backend in backends:
        generator: Generator | None = None
        try:
            generator = load(backend)
            generator.generate(requests, removed_sets[0])
            started = time.perf_counter()
            generator.generate_together([(requests, removed, None) for removed in removed_sets])
            seconds[backend] = time.perf_counter() - started
        except UserError as error:
            problems[backend] = str(error)
        except ImportError as error:
            problems[backend] = f"it is not installed ({error})"
        finally:
            if generator is not None:
                close(generator)
            generator = None
            free_memory()
    if not seconds:
        raise UserError("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
    return Choice(min(seconds, key=seconds.__getitem__), seconds, problems)


def close(generator: Any) -> None:
    """Ends an engine that has to be ended."""
    if hasattr(generator, "close"):
        generator.close()


def free_memory() -> None:
    """What nothing refers to any more goes back to the machine and its GPU, where the next model needs it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
