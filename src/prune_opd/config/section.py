"""What every section of a recipe has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from prune_opd.config.values import storable


class Section(BaseModel):
    """Unknown names are errors. Neither `true` nor "3" is a number. Nothing can be set after loading.

    `examples` of a field are values that work, for messages, where its default shows none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _every_value_is_storable(cls, value: Any) -> Any:
        return storable(value)
