"""The `search` section of a recipe."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raylp.config import Section
from raylp.metrics.objective import FORCED, usual_name
from raylp.search.short_heal import ShortHeal

TARGETS = ("layers", "remove", "given", "parameters", "bytes", "latency", "max_loss")


class Search(Section):
    """How many layers go, and how candidates are scored.

    The target is `layers` (how many stay; a list gives several depths from one search), `remove` (how many go), `given`
    (which go, in this order and the original model's numbers: a published list, no search), `parameters` or `bytes`
    (the most the model may have), `latency` (share of the unpruned model's estimated time for a token) or `max_loss`
    (points of the objective that may be lost). One of them is set; `max_loss` also beside another, which then is given
    up for it; `layers` also beside `given`, of whose list each depth then takes as many as have to go.

    `objective`: a metric (chrF++, BLEU, a COMET checkpoint, likelihood, agreement, module:function), or several with
    their weights. `strategy`: `race` scores candidates on as few sentences as the `risk` allows, `exhaustive` all on
    all, `sleb` by the likelihood, `oneshot` by the `criterion`. `beam`: sets kept from round to round; `per_round`:
    layers taken at once, while they cost no more together than `joint_tolerance` x what they cost one by one; `swaps`:
    moves tried at the end. `floor`: what decides where no candidate is better than noise. `short_heal`: the best few of
    every round are healed for a few steps before one is chosen.
    """

    layers: int | list[int] | None = None
    remove: int | None = Field(None, ge=1)
    given: list[int] | None = None
    parameters: float | None = Field(None, gt=0)
    bytes: float | None = Field(None, gt=0)
    latency: float | None = Field(None, gt=0, lt=1)
    max_loss: float | None = Field(None, ge=0)
    protect: list[int] = [0, -1]
    objective: dict[str, float] = {"chrF2++": 1.0}
    strategy: Literal["race", "exhaustive", "sleb", "oneshot"] = "race"
    risk: float = Field(0.05, gt=0, lt=0.5)
    criterion: Literal[
        "block_influence",
        "angular",
        "magnitude",
        "taylor",
        "gate_taylor",
        "perplexity",
        "ifr",
        "random",
        "middle",
        "tail",
    ] = "perplexity"
    beam: int = Field(1, ge=1)
    per_round: int = Field(1, ge=1)
    joint_tolerance: float = Field(1.25, ge=1)
    swaps: int = Field(0, ge=0)
    floor: Literal["keep", "likelihood", "heal"] | None = None
    short_heal: ShortHeal | None = None
    seed: int = 0
    backend: Literal["auto", "transformers", "vllm"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    block: int = Field(16, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _metric_is_an_objective(cls, value: Any) -> Any:
        if isinstance(value, dict) and "metric" in value and "objective" not in value:
            value = dict(value)
            value["objective"] = value.pop("metric")
        return value

    @field_validator("objective", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: 1.0}
        if isinstance(value, list):
            value = dict.fromkeys(map(str, value), 1.0)
        return {usual_name(str(name)): weight for name, weight in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _checked(self) -> "Search":
        named = [key for key in TARGETS if getattr(self, key) is not None]
        beside = "layers" if self.given is not None else "max_loss"
        if len(set(named) - {beside}) > 1 or not named:
            raise ValueError(
                "set one of layers (how many stay), remove (how many go), given (which go), parameters, bytes, "
                "latency, max_loss"
            )
        if not self.objective or any(weight <= 0 for weight in self.objective.values()):
            raise ValueError("objective needs at least one metric, and weights above 0")
        if self.layers is not None and (not self.depths or any(depth < 1 for depth in self.depths)):
            raise ValueError("layers: at least 1 has to stay")
        if self.beam > 1 and self.per_round > 1:
            raise ValueError("beam and per_round do not go together: set one of them")
        if self.strategy == "oneshot" and (self.beam > 1 or self.per_round > 1):
            raise ValueError("oneshot decides once: beam and per_round are for the other strategies")
        if self.swaps and self.max_loss is not None:
            raise ValueError("swaps are moves at a fixed size, which max_loss does not set: leave one of them out")
        if self.strategy in ("sleb", "oneshot") and self.short_heal is not None:
            raise ValueError("short_heal chooses among the best by the objective: use strategy race or exhaustive")
        forced = [name for name in self.objective if name in FORCED]
        if forced and self.heals:
            raise ValueError(f"a short heal is judged by translations: leave {forced[0]} out of the objective")
        if forced and len(forced) < len(self.objective) and self.backend != "transformers":
            raise ValueError(f"{forced[0]} needs transformers, and a mix with it would load both backends in turn")
        return self

    @property
    def depths(self) -> list[int]:
        """Numbers of layers that stay, the most first; empty where the target is another."""
        wanted = self.layers if isinstance(self.layers, list) else [self.layers] if self.layers is not None else []
        return sorted(set(wanted), reverse=True)

    @property
    def heals(self) -> bool:
        """Whether candidates may be healed, for which there must be training text."""
        return self.short_heal is not None or self.floor == "heal"

    @property
    def decided_floor(self) -> str:
        """`floor`, or by default: the published loop keeps to its metric, the others take the likelihood."""
        return self.floor or ("keep" if self.strategy == "exhaustive" else "likelihood")
