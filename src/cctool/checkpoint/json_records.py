"""JSON text of a file to validated records."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cctool.base.errors import CorruptCheckpointError, SpecError
from cctool.checkpoint.file.payload import canonical
from cctool.checkpoint.spec import History, ModelSpec

__all__ = ["parse_digests", "parse_history", "parse_spec"]

_MAX_TEXT = 64 * 2**20
_R = TypeVar("_R", bound=BaseModel)


def parse_spec(text: Any) -> ModelSpec:
    """Validate the JSON text of a spec. Raises SpecError with the first thing that is wrong."""
    return _parse(ModelSpec, text, "spec")


def parse_history(text: Any) -> History:
    """Validate the JSON text of a history. Raises SpecError with the first thing that is wrong."""
    return _parse(History, text, "history")


def parse_digests(text: Any) -> dict[str, str]:
    """Validate the JSON text of the digests."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise CorruptCheckpointError("the digests are not JSON text") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CorruptCheckpointError("the digests are not a table of texts")
    return found


def _parse(record: type[_R], text: Any, what: str) -> _R:
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        raise SpecError(f"the {what} is missing or is not JSON text")
    try:
        found = record.model_validate_json(text)
        # JSON values inside may hold NaN or 1e999, which pydantic lets pass.
        canonical(found.model_dump(mode="json"))
        return found
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or what
        raise SpecError(f"the {what} is malformed at {place}: {problem['msg']}") from None
