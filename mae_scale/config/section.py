"""The base of a recipe's sections."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
