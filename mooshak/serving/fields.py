"""Fields of a JSON request, taken one by one with a check of their types; errors for clients."""

from collections.abc import Iterable, Mapping
from typing import Any

from mooshak.errors import did_you_mean

ABSENT: Any = None
"""A field that is null is one that is not given."""


class ApiError(Exception):
    """An error that a client receives, in the form of the OpenAI API."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ):
        """`param` is the name of the field; `code` is a word for programs."""
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """Return the JSON of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": " ".join(str(self).split()),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


TYPES: Mapping[str, tuple[type, ...]] = {
    "true or false": (bool,),
    "an integer": (int,),
    "a number": (int, float),
    "a text": (str,),
    "a list": (list,),
    "an object": (dict,),
    "a text or a list": (str, list),
}
"""Name of a JSON type in errors -> its Python types."""


class Fields:
    """The fields of a JSON object that have not been taken yet."""

    def __init__(self, values: Any, name: str = ""):
        """`name` is that of the object, if it is itself a field. Raises `ApiError`."""
        self.prefix = f"{name}." if name else ""
        if not isinstance(values, dict):
            raise ApiError(f"{name or 'the body'} must be a JSON object", name or None)
        self.left = {key: value for key, value in values.items() if value is not None}
        self._known: set[str] = set()

    def take(self, name: str, wanted: str, default: Any = ABSENT) -> Any:
        """Return a field, which is then taken. Raises `ApiError` if it has another type."""
        self._known.add(name)
        value = self.left.pop(name, ABSENT)
        if value is ABSENT:
            return default
        if not is_a(value, wanted):
            raise ApiError(f"{self.prefix}{name} must be {wanted}", self.prefix + name)
        return value

    def any(self, name: str) -> Any:
        """Return a field of any type, or `ABSENT`."""
        self._known.add(name)
        return self.left.pop(name, ABSENT)

    def end(self, known: Iterable[str] = ()) -> None:
        """Raise `ApiError` if a field is left. `known` are more fields that there might be."""
        for name in self.left:
            near = did_you_mean(name, self._known | set(known))
            raise ApiError(f"unknown field {self.prefix}{name}{near}", self.prefix + name)


def is_a(value: Any, wanted: str) -> bool:
    """Return whether a JSON value has a type of `TYPES`."""
    types = TYPES[wanted]
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
