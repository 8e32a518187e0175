"""Reads the JSON lines that runs and predictions write, which a crash may have cut."""

import json

from etils import epath

from vlalign_jax.errors import InputError


def read(place: str, key: str, fix: str) -> list[dict]:
  """Returns the objects of a file, without a half-written last one; none if the file is missing.

  Args:
    place: a path or a URL.
    key: of an integer that every object must have.
    fix: what to do about a damaged line, for errors.

  Raises:
    InputError: a line before the last is damaged.
  """
  path, lines = epath.Path(place), []
  if not path.exists():
    return []
  for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
    try:
      lines.append(json.loads(text))
      if not (isinstance(lines[-1], dict) and isinstance(lines[-1].get(key), int)):
        raise ValueError(f"not an object with a number as {key}")
    except ValueError as error:
      raise InputError(f"{place}, line {number}: damaged ({error}); {fix}") from error
  return lines
