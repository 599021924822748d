"""What the value of any setting must be besides its type: something that a run can use and config.json can hold."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, HttpUrl, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

MOST = 2**32 - 1
"""The largest whole number of a setting: numpy takes no larger seed, and a run has as many of nothing."""
MOST_IN_A_NAME = 255  # bytes that file systems take between two slashes


def storable(value: Any) -> Any:
    """`value` as it is. ValueError at a text with control characters, a number without bounds, or what is not JSON."""
    match value:
        case str():
            if odd := re.search("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", value):
                raise PydanticCustomError("text", f"it holds U+{ord(odd[0]):04X}, which is no character of a text")
        case float():
            if not math.isfinite(value):
                raise PydanticCustomError("json", f"{value} is no number that config.json can hold")
        case int():
            if abs(value) > MOST:
                raise PydanticCustomError("most", f"whole numbers go up to {MOST}")
        case dict():
            for key, inner in value.items():
                storable(key)
                storable(inner)
        case list():
            for inner in value:
                storable(inner)
        case None | BaseModel():
            pass
        case _:
            kind = type(value).__name__
            raise PydanticCustomError("json", f"{value} is a {kind}, which config.json cannot hold; a text can say it")
    return value


def _address(text: str) -> str:
    try:
        if TypeAdapter(HttpUrl).validate_python(text).port != 0:
            return text
        reason = "no server has port 0"
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input should be a valid URL, ")
    raise PydanticCustomError("address", f"this is not the address of a server ({reason[0].lower() + reason[1:]})")


def _folder(text: str) -> str:
    if any(len(part.encode()) > MOST_IN_A_NAME for part in text.split("/")):
        raise PydanticCustomError("folder", f"no folder has a name of more than {MOST_IN_A_NAME} bytes")
    return text


Name = Annotated[str, Field(min_length=1)]
Address = Annotated[str, AfterValidator(_address)]
Folder = Annotated[Name, AfterValidator(_folder)]
