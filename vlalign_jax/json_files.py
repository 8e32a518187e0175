"""Reads and writes the JSON files of a model directory, such as config.json."""

import json
from typing import Any

from vlalign_jax.errors import InputError


def read(path: str) -> dict[str, Any] | None:
  """Returns the object in a JSON file; None if there is no such file.

  Raises:
    InputError: the file cannot be read or does not hold an object.
  """
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except ValueError as error:
    raise InputError(f"{path}: cannot be read: not a valid JSON file ({error}); fix it") from error
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error}); fix it") from error
  if not isinstance(content, dict):
    raise InputError(f"{path}: not a JSON object; fix it")
  return content


def write(path: str, content: dict[str, Any]) -> None:
  """Writes an object as transformers does: indented, with sorted keys."""
  with open(path, "w", encoding="utf-8") as file:
    file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
