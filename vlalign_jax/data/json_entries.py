"""The objects in a JSON array or JSON lines, and words for what is wrong with one."""

import json
from collections.abc import Iterator
from typing import Any

from vlalign_jax.errors import InputError


def entries(path: str) -> Iterator[tuple[int, Any]]:
  """(index, parsed JSON) of every record; an InputError in place of a malformed line.

  Args:
    path: a JSON array, or JSON lines if it ends with .jsonl or .ndjson.

  Raises:
    InputError: the file as a whole is unusable.
  """
  text = _read_text(path)
  if not text.strip():
    raise InputError(f"{path}: the file is empty; give a list of records")
  if not is_json_lines(path):
    try:
      found = json.loads(text)
    except json.JSONDecodeError as error:
      hint = "; name it .jsonl if it holds JSON lines" if error.msg == "Extra data" else "; mend it"
      place = f"line {error.lineno}, column {error.colno}"
      raise InputError(f"{path}: malformed JSON at {place} ({error.msg}){hint}") from error
    except (ValueError, RecursionError) as error:
      raise InputError(f"{path}: malformed JSON ({error}); mend it") from error
    if not isinstance(found, list):
      raise InputError(f"{path}: holds {kind(found)}, not a list of records; wrap it in [ ]")
    if not found:
      raise InputError(f"{path}: the list of records is empty; give at least one")
    yield from enumerate(found)
    return
  if text.lstrip().startswith("["):
    raise InputError(f"{path}: holds a JSON array, not JSON lines; name it .json")
  for number, line in enumerate(text.split("\n"), start=1):  # U+2028 does not end a line here
    if not line.strip():
      continue
    try:
      yield number, json.loads(line)
    except json.JSONDecodeError as error:
      reason = f"malformed JSON at column {error.colno} ({error.msg}); mend it"
      yield number, InputError(f"{path}, line {number}: {reason}")
    except (ValueError, RecursionError) as error:
      yield number, InputError(f"{path}, line {number}: malformed JSON ({error}); mend it")


def _read_text(path: str) -> str:
  try:
    with open(path, "rb") as file:
      content = file.read()
  except FileNotFoundError as error:
    raise InputError(f"{path}: no such file; check data.train and data.eval") from error
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from error
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise InputError(f"{path}: line {line} is not UTF-8; convert the file to UTF-8") from error


def is_json_lines(path: str) -> bool:
  """Whether a file is read line by line; by its name."""
  return path.lower().endswith((".jsonl", ".ndjson"))


def as_text(value: Any, name: str) -> str:
  """`value`, if it is text that tokenizers can take.

  Raises:
    InputError: it is not; `name` says what it is of.
  """
  if not isinstance(value, str):
    raise InputError(f"{name} is {kind(value)}; give text")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; tokenizers cannot
    raise InputError(f"{name} holds half a surrogate pair; remove it") from error
  return value


def kind(value: Any) -> str:
  """What a JSON value is, such as "a list"."""
  names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
  return names.get(type(value), "a number")


def quote(value: Any) -> str:
  """A JSON value as an error shows it: on one line, not long, printable."""
  shown = json.dumps(value, ensure_ascii=False)
  shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
  return shown.encode(errors="backslashreplace").decode()
