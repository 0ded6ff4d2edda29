"""Quantises a checkpoint by llm-compressor. Runs by itself, in an environment of its own: it imports nothing of raylp.

    python compress.py JOB

JOB: JSON with source, target (directories), scheme, group_size, and texts: lists of token ids to calibrate on.
"""

import json
import sys
from pathlib import Path
from typing import Any

IGNORED = ["re:.*lm_head", "re:.*embed.*", "re:.*(vision|visual|audio|image).*", "re:.*(gate|router)$"]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        from llmcompressor.pipelines.cache import IntermediatesCache

        # AWQ pins memory to copy it to a GPU; without one, torch refuses to.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.bfloat16 if device == "cuda" else "auto")
    texts = job["texts"]
    calibration: dict[str, Any] = {}
    if texts:
        from datasets import Dataset

        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]
        calibration = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": max(map(len, texts)),
        }
    oneshot(model=model, recipe=modifiers(job["scheme"], job["group_size"]), **calibration)
    # The vocabulary and the norms as they are served.
    model.to(torch.bfloat16).save_pretrained(job["target"], save_compressed=True)


def modifiers(scheme: str, group_size: int) -> list[Any]:
    """What llm-compressor is to do."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if scheme == "fp8":
        return [QuantizationModifier(targets=["Linear"], ignore=IGNORED, scheme="FP8_DYNAMIC")]
    if scheme == "w8a8":
        return [GPTQModifier(targets=["Linear"], ignore=IGNORED, scheme="W8A8")]
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
    weights["symmetric"] = scheme == "gptq"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if scheme == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=IGNORED)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=IGNORED)]


if __name__ == "__main__":
    main()
