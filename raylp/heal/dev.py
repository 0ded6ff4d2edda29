"""Beside the training: an actor that translates the dev split with weights as they are saved, and keeps the best."""

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.generate.base import Request
from raylp.heal import plan
from raylp.heal.config import Heal
from raylp.heal.trainable import make_trainable, save_trained
from raylp.rundir import RunDir

WAIT_S = 0.1
BEHIND = 2  # looks that may be without a score when the next is taken: one in work, one that waits
STATE = "state.safetensors"
BEST = "best"


@dataclass(frozen=True)
class Asked:
    """A sentence of the dev split: its language pair, what the model is asked, and what it should say."""

    pair: str
    request: Request
    reference: str


class Scorer:
    """An actor. Weights are written to `place` in the run directory `url` before they are scored, scores beside them,
    so that a start after a crash scores what is left; of those scored only the best stay.

    `source`: the checkpoint that learns; `heal`: the section as a dict; `dtype`: to translate in; `newline`: whether a
    line break ends a translation; `board`: told of every score; `workers`: that train on this machine beside.
    """

    def __init__(
        self,
        source: str,
        heal: dict[str, Any],
        dtype: str,
        newline: bool,
        asked: Sequence[Asked],
        url: str,
        place: str,
        board: Any,
        workers: int,
    ) -> None:
        self.source, self.config, self.dtype, self.newline = Path(source), Heal.model_validate(heal), dtype, newline
        self.asked, self.rundir, self.place, self.board, self.workers = asked, RunDir(url), place, board, workers
        self.problem: str | None = None
        names = self.rundir.names(place)
        self.scores = {
            int(name.removesuffix(".json")): self.rundir.read_json(f"{place}/{name}")["chrF2++"]
            for name in names
            if name.endswith(".json")
        }
        for step, score in self.scores.items():
            board.score.remote(step, score)
        self.waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for name in names:
            if name.isdigit() and int(name) not in self.scores and self.rundir.complete(f"{place}/{name}"):
                self.waiting.put(int(name))
        self.taking = threading.Lock()
        self.loaded: tuple[Any, Any] | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def take(self, step: int, state: dict[str, Any]) -> None:
        """Keeps the trained weights `state` (by the model's parameter names) of this step; they are scored later."""
        from safetensors.torch import save_file

        while self.waiting.qsize() > 0 and self.problem is None:  # the training waits: one in work, one behind it
            time.sleep(WAIT_S)
        self.check()
        with self.taking:  # a training that starts again hands over the same step again
            if step in self.scores or self.rundir.complete(f"{self.place}/{step}"):
                return
            with self.rundir.building(f"{self.place}/{step}") as target:
                save_file(state, target / STATE)
            self.waiting.put(step)

    def finish(self, last: int) -> dict[int, float]:
        """Scores what is left up to step `last`, and writes the best weights, as `save_trained` does, to `best`; every
        step's score.
        """
        self.waiting.put(None)
        self.thread.join()
        self.check()
        scores = {step: score for step, score in self.scores.items() if step <= last}
        if not self.rundir.complete(f"{self.place}/{BEST}"):
            model, _ = self._model()
            there = {step: score for step, score in scores.items() if self.rundir.complete(f"{self.place}/{step}")}
            state = self._state(plan.best_look(there, True))
            with self.rundir.building(f"{self.place}/{BEST}") as target:
                save_trained(model, state, target)
        return scores

    def check(self) -> None:
        """Raises UserError where translating has failed."""
        if self.problem is not None:
            raise UserError(f"translating the dev split failed: {self.problem}", 1)

    def _work(self) -> None:
        try:
            while (step := self.waiting.get()) is not None:
                score = self._score(step)
                self.rundir.write_json(f"{self.place}/{step}.json", {"chrF2++": score})
                self.scores[step] = score
                self.board.score.remote(step, score)
                for other in set(self.scores) - {plan.best_look(self.scores, True)}:
                    self.rundir.remove(f"{self.place}/{other}")
        except Exception as error:  # the training learns of it at its next look
            self.problem = f"{type(error).__name__}: {error}"

    def _model(self) -> tuple[Any, Any]:
        """The model with what learns in it, and what generates with it."""
        if self.loaded is None:
            import torch

            from raylp.generate.transformers_view import TransformersGenerator
            from raylp.models.load import load_model, load_tokenizer

            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (self.workers + 1)))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            inner = load_model(self.source, self.dtype, device)
            model = make_trainable(inner, self.config).eval()
            self.loaded = model, TransformersGenerator(inner, load_tokenizer(self.source), self.newline)
        return self.loaded

    def _state(self, step: int) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.rundir.local(f"{self.place}/{step}") / STATE)

    def _score(self, step: int) -> float:
        """chrF++ of the dev split, the mean over its language pairs."""
        import torch

        from raylp.metrics.ngram import metric

        model, generator = self._model()
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self._state(step).items():
                own[name].copy_(value)
        outputs = generator.generate([one.request for one in self.asked])
        chrf = metric("chrF2++")
        found = []
        for pair in sorted({one.pair for one in self.asked}):
            texts = [
                (output.text, one.reference)
                for one, output in zip(self.asked, outputs, strict=True)
                if one.pair == pair
            ]
            found.append(chrf.score(chrf.statistics(*map(list, zip(*texts, strict=True))).sum(0)))
        return sum(found) / len(found)
