"""The base of every section of a recipe. Each room keeps its own section in its `config.py`."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
