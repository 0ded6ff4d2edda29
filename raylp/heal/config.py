"""The `heal` section of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from raylp.config import Section


class Lora(Section):
    """Low-rank adapters on every linear layer of the decoder."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class Loss(Section):
    """How much each part counts: `cross_entropy` of the target, `distillation` (divergence from the words of the model
    that was pruned, at the same places), `hidden` (distance from its states, layer by layer).

    `direction`: `forward` KL(teacher || student) or `reverse`; `top_k`: of the teacher's words, null for all;
    `entropy_weighted`: where the teacher is sure, a token counts little.
    """

    cross_entropy: float = Field(1.0, ge=0)
    distillation: float = Field(0.0, ge=0)
    hidden: float = Field(0.0, ge=0)
    direction: Literal["forward", "reverse"] = "forward"
    top_k: int | None = Field(64, ge=2)
    temperature: float = Field(1.0, gt=0)
    entropy_weighted: bool = False

    @property
    def weights(self) -> dict[str, float]:
        """Of the parts that count."""
        parts = {"cross_entropy": self.cross_entropy, "distillation": self.distillation, "hidden": self.hidden}
        return {name: weight for name, weight in parts.items() if weight > 0}

    @property
    def taught(self) -> bool:
        """Whether the unpruned model is needed beside the one that learns."""
        return self.distillation > 0 or self.hidden > 0

    @model_validator(mode="after")
    def _something(self) -> "Loss":
        if not self.weights:
            raise ValueError("nothing counts: give cross_entropy, distillation or hidden a weight")
        return self


class Heal(Section):
    """`when`: `after` pruning, `before` it (adapts the baseline), or `both`. `data`: what to learn from.
    `start`: what is healed, the models as pruned or as a method of `repair` left them.

    `method`: `lora` adapters, merged afterwards, or `full`: all of the decoder but its embeddings and output layer,
    which stay as they are. `batch_size` counts sentences of one optimiser step over all workers; `learning_rate` is its
    peak. `max_tokens`: longer examples, prompt included, are left out.
    `row_tokens`: the most tokens a worker computes at a time; lower it when memory runs out, the result is the same.
    `packing`: examples behind their common prompt in one row (auto: where that gives the model's own loss).
    `matmul`: `bfloat16` lets products of float32 matrices use the bfloat16 units of a CPU or the TF32 ones of a GPU.
    """

    when: Literal["after", "before", "both"] = "after"
    start: Literal["pruned", "compensated", "merged", "concatenated"] = "pruned"
    method: Literal["lora", "full"] = "lora"
    data: Literal["authentic", "teacher", "both"] = "both"
    loss: Loss = Loss()
    lora: Lora = Lora()
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1)
    row_tokens: int = Field(2048, ge=16)
    max_tokens: int = Field(1024, ge=16)
    packing: Literal["auto", "on", "off"] = "auto"
    learning_rate: float = Field(2e-4, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    workers: int = Field(1, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    matmul: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
