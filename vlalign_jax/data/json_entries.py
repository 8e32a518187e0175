"""Reads the values in a JSON array or JSON lines, and words what is wrong with one."""

import json
from collections.abc import Iterator
from typing import Any

from vlalign_jax.errors import InputError


def entries(path: str) -> Iterator[tuple[int, Any]]:
  """Yields (index, parsed JSON) for every record; an InputError in place of a malformed line.

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
      array = json.loads(text)
    except json.JSONDecodeError as error:
      hint = "; name it .jsonl if it holds JSON lines" if error.msg == "Extra data" else "; fix it"
      place = f"line {error.lineno}, column {error.colno}"
      raise InputError(f"{path}: malformed JSON at {place} ({error.msg}){hint}") from error
    except (ValueError, RecursionError) as error:
      raise InputError(f"{path}: malformed JSON ({error}); fix it") from error
    if not isinstance(array, list):
      raise InputError(f"{path}: holds {kind(array)}, not a list of records; wrap it in [ ]")
    if not array:
      raise InputError(f"{path}: the list of records is empty; give at least one")
    yield from enumerate(array)
    return
  if text.lstrip().startswith("["):
    raise InputError(f"{path}: holds a JSON array, not JSON lines; name it .json")
  for number, line in enumerate(text.split("\n"), start=1):  # U+2028 does not end a line here
    if not line.strip():
      continue
    try:
      yield number, json.loads(line)
    except json.JSONDecodeError as error:
      reason = f"malformed JSON at column {error.colno} ({error.msg}); fix it"
      yield number, InputError(f"{path}, line {number}: {reason}")
    except (ValueError, RecursionError) as error:
      yield number, InputError(f"{path}, line {number}: malformed JSON ({error}); fix it")


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
  """Returns whether a file's name says that it holds JSON lines."""
  return path.lower().endswith((".jsonl", ".ndjson"))


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
  """Returns words for the type of a JSON value, such as "a list"."""
  names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
  return names.get(type(value), "a number")


def quote(value: Any) -> str:
  """Returns a JSON value as an error shows it: short, printable, on one line."""
  shown = json.dumps(value, ensure_ascii=False)
  shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
  return shown.encode(errors="backslashreplace").decode()
