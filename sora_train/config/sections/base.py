"""What every section of the configuration has in common: frozen, strict, documented where declared."""

import pydantic


class Section(pydantic.BaseModel):
    """A frozen group of keys; an unknown key or a value of another type is an error."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )
