"""Randomly initialised models of known shapes, for measurements that ask for a size and not for sense."""

from typing import Any

# Randomly initialised: (model type, configuration). 8b is Llama 3.1's shape, aya-8b Aya Expanse's.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "llama",
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 8192,
        },
    ),
    "8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "aya-8b": (
        "cohere",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 256000,
        },
    ),
}


def random_model(shape: str, dtype: str, device: str) -> Any:
    """A model of the shape, made on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)
