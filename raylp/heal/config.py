"""The `heal` section of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from raylp.config import Section


class Lora(Section):
    """Low-rank adapters on every linear layer of the decoder; a mixture's experts are none. `rslora`: scaled by alpha /
    sqrt(rank).
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False


class Loss(Section):
    """How much each part counts: `cross_entropy` of the target, `distillation` (divergence from a teacher's words at
    the same places), `hidden` (distance from the states of the model that was pruned, layer by layer).

    `teacher`: `base`, the model that was pruned, computed beside; or `stored`, the probabilities that `distill.top_k`
    kept, of teacher data only.
    `direction`: `forward` KL(teacher || student) or `reverse`; `top_k`: of the teacher's words, null for all;
    `entropy_weighted`: where the teacher is sure, a token counts little.
    """

    cross_entropy: float = Field(1.0, ge=0)
    distillation: float = Field(0.0, ge=0)
    hidden: float = Field(0.0, ge=0)
    teacher: Literal["base", "stored"] = "base"
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
    def needs_base(self) -> bool:
        """Whether the unpruned model is needed beside the one that learns."""
        return self.hidden > 0 or (self.distillation > 0 and self.teacher == "base")

    @property
    def stored(self) -> bool:
        """Whether a teacher's kept probabilities are learned from."""
        return self.distillation > 0 and self.teacher == "stored"

    @model_validator(mode="after")
    def _something(self) -> "Loss":
        if not self.weights:
            raise ValueError("nothing counts: give cross_entropy, distillation or hidden a weight")
        return self


# What may change while a training is interrupted: where and in what portions it is computed, not what (but for dropout,
# which is drawn anew for every portion).
FREE = ("workers", "row_tokens", "offload", "gradient_checkpointing", "checkpoint_every")


class Heal(Section):
    """`when`: `after` pruning, `before` it (adapts the baseline), or `both`. `data`: what to learn from,
    and of `both`, `teacher_share` of the examples from the teacher (default: as many as there are).
    `every`: prune so many layers, heal, and search on from the healed model, until the search's target is reached;
    the baseline learns as many steps in all. Default: once, at the end.
    `start`: what is healed, the models as pruned or as a method of `repair` left them.

    `baseline`: whether the unpruned model is healed alike, without which nothing can be said fairly.
    `method`: `lora` adapters, merged afterwards; `qlora`, the same over weights of 4 bits (nf4, quantised twice),
    merged into the weights as they were; or `full`: all of the decoder but its embeddings and output layer,
    which stay as they are. `batch_size` counts sentences of one optimiser step over all workers; `learning_rate` is its
    peak. `max_tokens`: longer examples, prompt included, are left out.
    `row_tokens`: the most tokens a worker computes at a time, but for an example that is longer by itself; lower it
    when memory runs out, the result is the same.
    `packing`: examples behind their common prompt in one row (auto: where that gives the model's own loss).
    `offload`: the optimizer's state (ZeRO 1 to 3), or the weights too (ZeRO 3), lie in the machine's memory.
    `gradient_checkpointing`: activations are computed twice instead of kept.
    `keep`: the weights of the best look at the dev split, by its `loss` or by `chrF++` of translations, which an actor
    makes beside the training (on a GPU of its own, where the cluster has any); or the `last`. `look_every`: steps
    between looks (default: an epoch). `patience`: so many looks without a better one end the training.
    `matmul`: `bfloat16` lets products of float32 matrices use the bfloat16 units of a CPU or the TF32 ones of a GPU.
    """

    when: Literal["after", "before", "both"] = "after"
    every: int | None = Field(None, ge=1)
    start: Literal["pruned", "compensated", "merged", "concatenated"] = "pruned"
    baseline: bool = True
    method: Literal["lora", "qlora", "full"] = "lora"
    data: Literal["authentic", "teacher", "both"] = "both"
    teacher_share: float | None = Field(None, gt=0, lt=1)
    loss: Loss = Loss()
    lora: Lora = Lora()
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1)
    row_tokens: int = Field(2048, ge=16)
    max_tokens: int = Field(1024, ge=16)
    packing: bool | Literal["auto"] = "auto"
    learning_rate: float = Field(2e-4, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    gradient_checkpointing: bool = False
    workers: int = Field(1, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    keep: Literal["loss", "chrF++", "last"] = "loss"
    look_every: int | None = Field(None, ge=1)
    patience: int | None = Field(None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    matmul: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    @property
    def looks_at_dev(self) -> bool:
        """Whether the dev split is needed: without it, the last weights are kept."""
        return self.keep == "chrF++" or self.patience is not None

    @model_validator(mode="after")
    def _fits(self) -> "Heal":
        if self.every is not None and self.when == "before":
            raise ValueError("every is about healing after pruning: set when: after or both")
        if self.when == "before" and (self.data == "teacher" or self.loss != Loss()):
            raise ValueError("before pruning there is no teacher: data and loss are those of authentic pairs then")
        if self.patience is not None and self.epochs == 1 and self.look_every is None:
            raise ValueError("patience needs several looks at dev: set look_every, or more epochs")
        if self.loss.teacher == "stored" and self.loss.distillation == 0:
            raise ValueError("loss.teacher: stored counts for nothing: give loss.distillation a weight")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("offload: all needs zero_stage 3")
        if self.method == "qlora" and self.zero_stage == 3:
            raise ValueError("qlora: ZeRO 3 cannot share out weights of 4 bits: use zero_stage 0, 1 or 2")
        if self.loss.stored and self.data == "authentic":
            raise ValueError("loss.teacher: stored is about teacher data: set data to teacher or both")
        if self.patience is not None and self.keep == "last":
            raise ValueError("patience ends a training that gets no better: say by what, keep: loss or chrF++")
        if self.loss.stored and self.loss.cross_entropy == 0 and self.loss.hidden == 0 and self.data == "both":
            raise ValueError(
                "authentic data has no stored probabilities: give loss.cross_entropy a weight, or set data: teacher"
            )
        if self.teacher_share is not None and self.data != "both":
            raise ValueError("teacher_share is a share of both kinds of data: set data: both")
        return self
