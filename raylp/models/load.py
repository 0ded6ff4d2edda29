"""A checkpoint directory into memory, without running anybody's code."""

from pathlib import Path
from typing import Any

from raylp.errors import UserError
from raylp.models.files import safetensors_header, weight_files

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(BYTES_PER_WEIGHT)


def read_config(path: Path) -> Any:
    """The configuration of the checkpoint in `path`.

    Raises:
        UserError: it is not there, or transformers does not know what it says.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise UserError(f"model {path}: transformers cannot read its config.json: {error}") from error


def read_generation_config(path: Path) -> Any:
    """generation_config.json of the checkpoint in `path`, or what its config.json says about generation."""
    from transformers import GenerationConfig

    if not (path / "generation_config.json").exists():
        return GenerationConfig.from_model_config(read_config(path))
    try:
        return GenerationConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"model {path}: transformers cannot read its generation_config.json: {error}") from error


def keeps_keys(cache: Any) -> bool:
    """Whether every layer of transformers' cache holds keys and values of its own, of all tokens or of a window."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def check_layers(path: Path) -> None:
    """Refuses a model whose layers cannot be left out: each is to keep keys and values of its own, all alike in size.

    Raises:
        UserError: with what its layers are instead.
    """
    from transformers import DynamicCache

    config = read_config(path).get_text_config(decoder=True)
    what = ""
    if getattr(config, "is_heterogeneous", False):
        what = "layers of different sizes"
    elif getattr(config, "num_kv_shared_layers", 0):
        what = "layers that use the keys of others"
    elif not keeps_keys(DynamicCache(config=config)):
        what = "layers without keys and values, as those of linear attention and state spaces"
    if what:
        raise UserError(f"model {path}: a {config.model_type} has {what}, which raylp does not leave out: take another")


def max_positions(path: Path) -> int | None:
    """The most tokens the model in `path` was made for, where its configuration says so."""
    config = read_config(path).get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def head_dim(config: Any) -> int:
    """Numbers in one attention head's vector, from the configuration of a decoder."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_per_token(config: Any) -> int:
    """Numbers that the keys and values of one token take in a cache, over all layers of the decoder's `config`."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * head_dim(config) * config.num_hidden_layers


def stored_dtype(path: Path) -> str:
    """The data type most of the weights in `path` are stored in, counted in bytes."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    sizes: dict[str, int] = {}
    for file in weight_files(path):
        for tensor in safetensors_header(file).values():
            start, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - start
    if not sizes:
        raise UserError(f"model {path}: there are no tensors in its weights")
    largest = max(sizes, key=lambda name: sizes[name])
    return names.get(largest, "bfloat16")


def model_class(path: Path) -> Any:
    """The transformers class named by the checkpoint, checked to be one that generates text from a decoder alone."""
    import transformers

    config = read_config(path)
    names = config.architectures or []
    known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if names and not known:
        raise UserError(f"model {path}: this transformers does not know the architecture {names[0]}")
    if not known:
        raise UserError(f"model {path}: its config.json names no architecture")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model {path}: {names[0]} is an encoder-decoder model, which raylp cannot prune yet")
    if not known[0].can_generate():
        raise UserError(f"model {path}: {names[0]} has no decoder stack that generates text")
    return known[0]


def load_model(path: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """The model in evaluation mode on `device`.

    On the CPU, with `dtype` the stored one, the weights stay a memory map of the file: processes on one machine share
    their pages as long as nobody writes to them.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Quantised weights are put on their device as they are read, and cannot be moved.
    quantised = getattr(read_config(path), "quantization_config", None) is not None
    model = model_class(path).from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        trust_remote_code=False,
        use_safetensors=True,
        **({"device_map": {"": device}} if quantised else {}),
    )
    return (model if quantised else model.to(device)).eval().requires_grad_(False)


def load_quantised(path: Path, dtype: str = "float32", device: str = "cpu", scheme: str = "nf4") -> Any:
    """The model with its linear layers quantised by bitsandbytes, computing in `dtype`: to 4 bits (`nf4`, quantised
    twice) or to 8 (`int8`).
    """
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    if scheme == "int8":
        bits = BitsAndBytesConfig(load_in_8bit=True)
    else:
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    model = model_class(path).from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        trust_remote_code=False,
        use_safetensors=True,
        quantization_config=bits,
        device_map={"": device},
    )
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside the weights, with a padding token.

    Raises:
        UserError: it is not there, or broken.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library under it raises nothing narrower
        raise UserError(f"model {path}: its tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
