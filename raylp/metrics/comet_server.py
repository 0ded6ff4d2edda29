"""COMET behind a pipe. Runs under the interpreter of .venv-comet and imports nothing of raylp.

One JSON object a line, requests on stdin, answers on stdout; all that COMET and its libraries print goes to stderr.

    {"phase": "start" | "fetch" | "load"}           what comes next, before the first request
    {"ready": true}                                 or {"error": text}, after which the process ends
    <- {"rows": [{"src", "mt", "ref"}, ...]}        `ref` is left out for models that need none
    {"done": rows}                                  now and then
    {"scores": [float, ...]}                        or {"error": text}

The end of stdin, which comes with the end of whoever started it, ends the process at once, whatever it is doing.
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections import OrderedDict
from typing import Any

BATCH = 16  # comet-score's default
TELL_EVERY_S = 1.0
MAX_REMEMBERED = 2048  # batches of embeddings, 32 kB each for an XLM-R of 1,024 channels


def main() -> int:
    """Arguments: checkpoint (hub name or .ckpt file), device (auto, cpu, cuda), dtype (float16, float32)."""
    checkpoint, device, dtype = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")

    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    try:
        scorer = _Scorer(checkpoint, device, dtype, tell)
    except Exception as error:
        traceback.print_exc()
        tell(error=_one_line(error))
        return 1
    tell(ready=True)
    while True:
        try:
            tell(scores=scorer.score(json.loads(requests.get())["rows"]))
        except Exception as error:
            traceback.print_exc()
            tell(error=_one_line(error))


def _listen(requests: "queue.SimpleQueue[bytes]") -> None:
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


class _Scorer:
    """The model, and the way `comet-score` uses it: half precision, sentences by source length in batches of 16."""

    def __init__(self, checkpoint: str, device: str, dtype: str, tell: Any) -> None:
        tell(phase="start")
        import torch
        from comet import download_model, load_from_checkpoint

        self.tell = tell
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        if not os.path.exists(checkpoint):
            tell(phase="fetch")
            checkpoint = download_model(checkpoint)
        tell(phase="load")
        self.model = load_from_checkpoint(checkpoint).eval().to(self.device)
        if dtype == "float16":
            self.model.half()
        # Found where the model looks it up, before the class's own; models that read all texts at once never call it.
        self.model.get_sentence_embedding = _remembered(self.model.compute_sentence_embedding)

    def score(self, rows: list[dict[str, str]]) -> list[float]:
        """One score for each row. Batches are those of `predict` (comet/models/base.py), since in half precision a
        score depends in its fourth digit on the padding, and so on the batch."""
        import numpy as np
        import torch

        if self.model.requires_references() and "ref" not in rows[0]:
            raise ValueError("this checkpoint needs references")
        order = np.argsort([len(row["src"]) for row in rows])
        scores = [0.0] * len(rows)
        told = time.monotonic()
        with torch.inference_mode():
            for start in range(0, len(rows), BATCH):
                chosen = order[start : start + BATCH]
                batch = self.model.prepare_sample([rows[i] for i in chosen], stage="predict")
                batch = self.model.transfer_batch_to_device(batch, torch.device(self.device), 0)
                found = self.model.predict_step(batch)["scores"].reshape(-1).tolist()
                for i, score in zip(chosen, found, strict=True):
                    scores[i] = score
                if time.monotonic() - told >= TELL_EVERY_S:
                    told = time.monotonic()
                    self.tell(done=start + len(chosen))
        return scores


def _remembered(compute: Any) -> Any:
    """`compute` with its last results kept: sources and references come again with every system.

    COMET's own cache (2.2.7) compares tensors given by keyword by identity, so it never finds one again; this one
    compares every token.
    """
    known: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def embedding(input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
        tensors = (input_ids, attention_mask, token_type_ids)
        key = tuple(None if t is None else (tuple(t.shape), t.cpu().numpy().tobytes()) for t in tensors)
        if key not in known:
            known[key] = compute(input_ids, attention_mask, token_type_ids=token_type_ids)
            if len(known) > MAX_REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    return embedding


def _one_line(error: Exception) -> str:
    text = str(error).strip().strip("'\"")
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"


if __name__ == "__main__":
    sys.exit(main())
