"""Writes records of any shape in LLaVA's own, with pictures as files."""

import base64
import json
import os
from collections.abc import Iterable
from typing import Any

from vlalign_jax.data.entries import entries
from vlalign_jax.data.records import Options, Record, parse_record
from vlalign_jax.errors import InputError


def convert(
  path: str, image_directory: str, placeholders: str = "match"
) -> tuple[list[dict[str, Any]], list[InputError]]:
  """Converts a data file; whether images that it names by path exist is not checked.

  Args:
    path: as for `entries.entries`.
    image_directory: the image root; pictures that the file holds are written there.
    placeholders: as in `records.Options`.

  Returns:
    (LLaVA records, an error for every bad one), both in file order.

  Raises:
    InputError: the file as a whole is unusable.
  """
  options = Options(image_directory, "optional", placeholders=placeholders, cache=image_directory)
  records, errors = [], []
  for index, place, entry in entries(path):
    try:
      if isinstance(entry, InputError):
        raise entry
      record, _ = parse_record(entry, path, index, place, options)
      records.append(to_llava(record))
    except InputError as error:
      errors.append(error)
  return records, errors


def to_llava(record: Record) -> dict[str, Any]:
  """Returns a record in LLaVA's shape, which is read as the same record; images below its root."""
  messages: list[dict[str, Any]] = []
  for turn in record.turns:
    messages.append({"from": "human", "value": turn.human})
    if turn.gpt is not None:
      messages.append({"from": "gpt", "value": turn.gpt})
  if record.answers:
    messages.append({"from": "gpt", "value": list(record.answers)})
  images = [os.path.relpath(i, record.root) if os.path.isabs(i) else i for i in record.images]
  fields: dict[str, Any] = {"id": record.id}
  if images:
    fields["image"] = images[0] if len(images) == 1 else images
  if record.system:
    fields["system"] = record.system
  return fields | {"conversations": messages}


def write(path: str, records: Iterable[Any], flag: str) -> None:
  """Writes records as JSON, or as JSON lines if the name ends with .jsonl, as one new file.

  Bytes become data URIs, which `pictures.locate` reads.

  Args:
    path: must not exist.
    records: of values that JSON has, and bytes.
    flag: that names the file, for errors.

  Raises:
    InputError: the file exists or cannot be written.
  """
  check_new(path, flag)
  as_lines = path.lower().endswith((".jsonl", ".ndjson"))
  partial = f"{path}.part"
  try:
    with open(partial, "w", encoding="utf-8") as file:
      between = ""
      file.write("" if as_lines else "[\n")
      for record in records:
        file.write(between + json.dumps(record, ensure_ascii=False, default=_spell))
        between = "\n" if as_lines else ",\n"
      file.write("\n" if as_lines else "\n]\n")
    os.replace(partial, path)
  except OSError as error:
    raise InputError(f"{flag} {path}: cannot be written ({error.strerror})") from error
  finally:
    if os.path.exists(partial):
      os.remove(partial)


def check_new(path: str, flag: str) -> None:
  """Raises an InputError if a file exists, or its directory does not; empty paths are fine."""
  if path and os.path.exists(path):
    raise InputError(f"{flag} {path} exists; remove it or name another file")
  if path and not os.path.isdir(os.path.dirname(path) or "."):
    raise InputError(f"{flag} {path}: cannot be written (No such file or directory)")


def _spell(value: Any) -> str:
  if isinstance(value, bytes):
    return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"
  return str(value)  # dates, for example
