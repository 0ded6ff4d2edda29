"""What taking layers out can gain at best: bytes read and multiply-adds for one token, from a checkpoint's headers.

Decoding on most hardware waits for memory: a step reads all weights of the layers and the vocabulary projection once,
whatever the number of sequences in it, and the keys and values of each sequence. Layers become fewer by pruning, the
vocabulary does not: with 262144 entries it can be the larger part of a small model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylp.models.checkpoint import is_expert, layer_costs, quantised_facts, read_card, read_tensors, vocabulary_size
from raylp.models.load import head_dim, kv_per_token, read_config


@dataclass(frozen=True)
class Text:
    """Tokens of a request, on average: of its prompt, of which the first `shared` are known from others, and answer."""

    prompt: float
    shared: float = 0
    answer: float = 0

    @property
    def context(self) -> float:
        """Tokens before the one that is made."""
        return self.prompt + self.answer / 2


@dataclass(frozen=True)
class Work:
    """Weights, as counts of numbers. `layers`: read for every token; `experts`: of which each token uses a part.

    `vocabulary`: of the projection to the vocabulary, which a tied embedding serves as. `kv_per_token`: keys and values
    that one token of context leaves, over all layers; `attention_per_token`: multiply-adds one token of context costs
    the next. `experts_used`, `num_experts`: of a mixture, else 0. `packed_bytes`: what the layers take where they are
    quantised; the rest is not.
    """

    layers: int
    experts: int
    vocabulary: int
    kv_per_token: int
    attention_per_token: int
    experts_used: int = 0
    num_experts: int = 0
    packed_bytes: int | None = None

    def numbers_read(self, concurrency: int, context: float) -> float:
        """Numbers read in one step that gives each of `concurrency` sequences a token after `context` tokens."""
        touched = 1.0
        if self.num_experts:
            # Each sequence picks its experts on its own.
            touched = 1 - (1 - self.experts_used / self.num_experts) ** concurrency
        return self.layers + touched * self.experts + self.vocabulary + concurrency * context * self.kv_per_token

    def bytes_read(self, concurrency: int, context: float, bytes_per_number: float) -> float:
        """Bytes of such a step, where what is not quantised takes so many bytes a number."""
        numbers = self.numbers_read(concurrency, context)
        if self.packed_bytes is None:
            return numbers * bytes_per_number
        rest = self.vocabulary + concurrency * context * self.kv_per_token
        return rest * bytes_per_number + (numbers - rest) / (self.layers + self.experts) * self.packed_bytes

    def multiply_adds(self, concurrency: int, context: float) -> float:
        """Multiply-adds of such a step."""
        share = self.experts_used / self.num_experts if self.num_experts else 1.0
        token = self.layers + share * self.experts + self.vocabulary + context * self.attention_per_token
        return concurrency * token

    def prompt_multiply_adds(self, text: Text) -> float:
        """Multiply-adds that read a prompt, whose last token alone asks the vocabulary."""
        share = self.experts_used / self.num_experts if self.num_experts else 1.0
        inside = (text.prompt - text.shared) * (self.layers + share * self.experts)
        attended = (text.prompt**2 - text.shared**2) / 2
        return inside + attended * self.attention_per_token + self.vocabulary

    def request_multiply_adds(self, text: Text) -> float:
        """Multiply-adds of a whole request; its first token comes with reading the prompt."""
        return self.prompt_multiply_adds(text) + max(0, text.answer - 1) * self.multiply_adds(1, text.context)


def work(path: Path) -> Work:
    """What one token costs the model in `path`.

    Raises:
        UserError: its tensors show no list of as many layers as its configuration says.
    """
    config = read_config(path).get_text_config(decoder=True)
    tensors = read_tensors(path)
    inside = {name: entry["shape"] for layer in tensors.layers for name, entry in layer.items()}
    experts = {name: shape for name, shape in inside.items() if is_expert(name)}
    quantised = quantised_facts(read_card(path))
    in_experts = quantised.get("expert_params", 0) if quantised else sum(map(math.prod, experts.values()))
    in_layers = sum(quantised["layer_params"]) if quantised else sum(map(math.prod, inside.values()))
    return Work(
        layers=in_layers - in_experts,
        experts=in_experts,
        vocabulary=vocabulary_size(tensors, config),
        kv_per_token=kv_per_token(config),
        attention_per_token=2 * config.num_attention_heads * head_dim(config) * config.num_hidden_layers,
        experts_used=getattr(config, "num_experts_per_tok", None) or 0 if experts else 0,
        num_experts=_num_experts(config) if experts else 0,
        packed_bytes=_packed_bytes(path, quantised) if quantised else None,
    )


def ideal(models: dict[str, Path], loads: Mapping[str, int], text: Text, bytes_per_number: int) -> dict[str, Any]:
    """For each model: its parts in bytes and multiply-adds a token, and the best speed-up over the first one by load.

    `by_bytes` and `by_operations` are of a step that gives each sequence a token, `prompt_by_operations` of reading a
    prompt, `request_by_operations` of both; `loads`: by name, how many sequences are at work at a time. Sliding windows
    are not looked at.
    """
    context = text.context
    works = {name: work(path) for name, path in models.items()}
    first = next(iter(works.values()))
    return {
        name: {
            "bytes": {
                "layers": own.packed_bytes
                if own.packed_bytes is not None
                else (own.layers + own.experts) * bytes_per_number,
                "vocabulary": own.vocabulary * bytes_per_number,
                "kv_cache_per_sequence": round(context * own.kv_per_token * bytes_per_number),
            },
            "multiply_adds_per_token": round(own.multiply_adds(1, context)),
            "speedup": {
                load: {
                    "by_bytes": first.bytes_read(at_once, context, bytes_per_number)
                    / own.bytes_read(at_once, context, bytes_per_number),
                    "by_operations": first.multiply_adds(at_once, context) / own.multiply_adds(at_once, context),
                    "prompt_by_operations": first.prompt_multiply_adds(text) / own.prompt_multiply_adds(text),
                    "request_by_operations": first.request_multiply_adds(text) / own.request_multiply_adds(text),
                }
                for load, at_once in loads.items()
            },
        }
        for name, own in works.items()
    }


def _packed_bytes(path: Path, quantised: dict[str, Any]) -> int:
    """Of the layers, as they are stored, or as the engine holds them where it quantises them itself."""
    if quantised["maker"] == "vllm":
        return sum(quantised["layer_params"]) * int(quantised["bits"]) // 8
    return sum(layer_costs(path).bytes)


def _num_experts(config: Any) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((value for name in names if (value := getattr(config, name, None))), 0)
