"""Words what is wrong with a value of a record."""

import json
from typing import Any

from vlalign_jax.errors import InputError, shorten


def as_text(value: Any, name: str) -> str:
  """Returns `value` if it is text that tokenizers accept.

  Raises:
    InputError: it is not; the message calls it `name`.
  """
  if not isinstance(value, str):
    raise InputError(f"{name} is {kind(value)}; give text")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; tokenizers cannot
    raise InputError(f"{name} holds half a surrogate pair; remove it") from error
  return value


def kind(value: Any) -> str:
  """Returns words for the type of a value, such as "a list"."""
  names = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "a boolean",
    bytes: "bytes",
    type(None): "null",
  }
  return names.get(type(value), "a number")


def quote(value: Any) -> str:
  """Returns a value as an error shows it: as JSON, short, printable, on one line."""
  shown = json.dumps(value, ensure_ascii=False, default=kind)
  if len(shown) > 100:
    shown = shorten(shown, 100)
  return shown.encode(errors="backslashreplace").decode()
