"""Which weights learn, and how they are put back into the checkpoint they came from."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.heal.config import Heal
from raylp.models.checkpoint import copy_beside_weights, write_card
from raylp.models.load import load_model, stored_dtype
from raylp.models.stack import find_stack

ADAPTER = "adapter"
WEIGHTS = "trainable.safetensors"


def make_trainable(model: Any, config: Heal) -> Any:
    """The model with the weights that `config.method` trains unfrozen, and all others frozen.

    `lora` and `qlora`: adapters on every linear layer of the decoder stack. `full`: the whole decoder but the
    embeddings and, where it lies inside, the output layer: a vocabulary of 262,144 would cost more than all layers
    together. Vision and audio towers are outside the decoder and stay as they are.

    Raises:
        UserError: the decoder has no linear layers to adapt.
    """
    import torch

    model.requires_grad_(False)
    if config.method == "full":
        kept = {id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for p in _weights(part)}
        for parameter in model.get_decoder().parameters():
            parameter.requires_grad_(id(parameter) not in kept)
        return model
    from peft import LoraConfig, get_peft_model

    stack = find_stack(model)
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{stack.path}.") and isinstance(module, torch.nn.Linear)
    ]
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layers in {stack.path}: use heal.method: full")
    # A pattern, not a list: peft reads listed names as endings, which other stacks may share.
    pattern = "|".join(re.escape(name) for name in linear)
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        use_rslora=config.lora.rslora,
        target_modules=pattern,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _weights(module: Any) -> list[Any]:
    return list(module.parameters()) if module is not None else []


def save_trained(model: Any, state: dict[str, Any], directory: Path) -> None:
    """Writes the trained weights `state` (by the model's parameter names): a peft adapter, or safetensors."""
    from safetensors.torch import save_file

    if not hasattr(model, "peft_config"):
        save_file(state, directory / WEIGHTS)
        return
    from peft import get_peft_model_state_dict

    target = directory / ADAPTER
    target.mkdir()
    adapter = model.peft_config["default"]
    adapter.inference_mode = True
    adapter.save_pretrained(target)
    adapter.inference_mode = False
    save_file(get_peft_model_state_dict(model, state_dict=state), target / "adapter_model.safetensors")


def merge(base: Path, trained: Path, target: Path, card: dict[str, Any]) -> None:
    """Writes the checkpoint `base` with the weights in `trained` put in to `target`, in the data type `base` has.

    Everything beside the weights is copied; `card`, its `stack` filled in where empty, becomes `raylp.json`.
    """
    import torch
    from safetensors.torch import load_file

    model = load_model(base, stored_dtype(base))
    if (trained / ADAPTER).is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, trained / ADAPTER).merge_and_unload(safe_merge=True)
    else:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in load_file(trained / WEIGHTS).items():
                own[name].copy_(value)
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    copy_beside_weights(base, target)
    card = {**card, "stack": card.get("stack") or find_stack(model).path}
    write_card(target, card)


def main() -> None:
    """`python -m raylp.heal.trainable BASE TRAINED TARGET CARD`: merges in a process that gives its memory back."""
    parser = argparse.ArgumentParser(description="Put trained weights into a checkpoint.")
    for name in ("base", "trained", "target", "card"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    merge(given.base, given.trained, given.target, json.loads(given.card.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
