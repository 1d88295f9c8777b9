"""What all groups of settings share: how they are checked, and types that come more than once."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from aceray.secrets import without_password

Fraction = Annotated[float, Field(ge=0, le=1)]
BoxSize = Annotated[int, Field(ge=8, le=1024, multiple_of=2)]
Uri = Annotated[str, Field(min_length=1), AfterValidator(without_password)]


class Model(BaseModel):
    """A group of settings: frozen, no unknown keys, finite numbers only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )
