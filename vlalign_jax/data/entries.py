"""Reads the entries of a data file, whatever holds them, told by content and not by name."""

import glob
import json
import os
from collections.abc import Iterator
from typing import Any

from vlalign_jax.data import json_entries, table_entries
from vlalign_jax.errors import InputError

# The first bytes of what may be taken for data, and what to say.
_COMPRESSED = {
  b"\x1f\x8b": "is compressed (gzip); unpack it",
  b"PK\x03\x04": "is a zip archive; unpack it",
  b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it",
  b"BZh": "is compressed (bzip2); unpack it",
}
_HEAD = 1 << 16


def entries(path: str) -> Iterator[tuple[int, str, Any]]:
  """Yields (number, place, entry) of every entry in file order; one at a time is in memory.

  The number is the index in a JSON array or the row of a table, from 0, or the line of JSON lines,
  from 1. The place names it in errors: "record 3", "line 3", "row 3". An entry is parsed JSON, in
  which tables have bytes, too; an InputError is in the place of a malformed line.

  Args:
    path: a JSON array, JSON lines, a Parquet file, a directory of Parquet files or a pattern for
      them, or a directory that `datasets.Dataset.save_to_disk` wrote.

  Raises:
    InputError: the file as a whole is unusable.
  """
  empty = True
  for entry in _opened(path):
    empty = False
    yield entry
  if empty:
    raise InputError(f"{path}: the list of records is empty; give at least one")


def _opened(path: str) -> Iterator[tuple[int, str, Any]]:
  if os.path.isdir(path):
    if files := table_entries.parquet_files(path):
      return table_entries.parquet(files)
    names = set(os.listdir(path))
    if names & {"state.json", "dataset_dict.json"}:
      return table_entries.saved_dataset(path)
    raise InputError(
      f"{path}: is a directory that holds neither *.parquet nor a saved data set (state.json);"
      " name a file"
    )
  if not os.path.exists(path) and glob.has_magic(path) and (files := glob.glob(path)):
    return _pattern(path, files)
  head = _head(path)
  for magic, problem in _COMPRESSED.items():
    if head.startswith(magic):
      raise InputError(f"{path}: {problem}")
  if head.startswith(b"PAR1"):
    return table_entries.parquet([path])
  text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
  if not text:
    raise InputError(f"{path}: the file is empty; give a list of records")
  if text.startswith(b"["):
    return json_entries.array(path)
  if text.startswith(b"{"):
    _check_lines(path)
    return json_entries.lines(path)
  raise InputError(f"{path}: is neither JSON, nor JSON lines, nor Parquet; convert it")


def _pattern(path: str, files: list[str]) -> Iterator[tuple[int, str, Any]]:
  other = [file for file in files if not _head(file).startswith(b"PAR1")]
  if other:
    raise InputError(f"{path}: {other[0]} is not a Parquet file; separate other files by commas")
  return table_entries.parquet(sorted(files))


def _head(path: str) -> bytes:
  try:
    with open(path, "rb") as file:
      head = file.read(_HEAD)
      while head and not head.strip() and (more := file.read(_HEAD)):
        head = more
      return head
  except FileNotFoundError as error:
    raise InputError(f"{path}: no such file; check data.train and data.eval") from error
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _check_lines(path: str) -> None:
  """Raises an InputError if the file is one JSON object, not one in each line."""
  with open(path, "rb") as file:
    first = file.readline()
    while not first.strip():
      first = file.readline()
    alone = not any(line.strip() for line in file) if first.strip() != b"{" else False
  is_line = first.rstrip().endswith(b"}")
  named = path.lower().endswith((".jsonl", ".ndjson"))
  if named or (is_line and not alone):
    return
  try:
    keys = list(json.loads(first.decode("utf-8-sig")))[:5] if is_line else []
  except ValueError:
    keys = []
  known = f" with the keys {', '.join(keys)}" if keys else ""
  raise InputError(
    f"{path}: holds an object{known}, not a list of records; wrap it in [ ], or give its list"
  )
