"""What may stand in a checkpoint's JSON files: declared as pydantic models, checked when a file is read."""
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cli import UserError


class Checked(BaseModel):
    """Keys of a JSON object, with types and ranges. Others may be there, and are not read."""
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


T = TypeVar("T", bound=BaseModel)


def checked(schema: type[T], content: Mapping[str, Any], where: str) -> T:
    """The object, if it is as the schema has it. where: what to call it. Errors: UserError."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))[:100]
        if first["type"] == "missing" and "." not in key:
            raise UserError(f"{where} has no {key!r}") from None
        reason = first["msg"].replace("Input should be", "should be").removeprefix("Value error, ")
        raise UserError(f"{where}: {key} {first['input']!r:.80}: {reason}") from None
