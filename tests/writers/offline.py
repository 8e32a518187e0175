"""Reads what wandb and Trackio have written to this machine, without their servers."""

import json
import pathlib
import sqlite3
import struct
from collections.abc import Iterator

_BLOCK, _HEADER = 32768, 7  # of LevelDB's log format, which .wandb files have


def wandb_records(path: pathlib.Path) -> Iterator:
  """Yields the Records of a .wandb file."""
  from wandb.proto import wandb_internal_pb2

  content, place, parts = path.read_bytes(), _HEADER, b""
  assert content[:4] == b":W&B"
  while place + _HEADER <= len(content):
    left = _BLOCK - place % _BLOCK
    _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
    if left < _HEADER or kind == 0:
      place += left
      continue
    place += _HEADER
    parts += content[place : place + length]
    place += length
    if kind in (1, 4):  # full, last
      record = wandb_internal_pb2.Record()
      record.ParseFromString(parts)
      parts = b""
      yield record


def wandb_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the .wandb files below a directory, the oldest first."""
  return sorted(directory.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)


def wandb_lines(path: pathlib.Path) -> list[dict]:
  """Returns what was logged, without wandb's own keys."""
  lines = []
  for record in wandb_records(path):
    if record.WhichOneof("record_type") == "history":
      items = record.history.item
      line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
      lines.append({key: value for key, value in line.items() if not key.startswith("_")})
  return lines


def wandb_pictures(path: pathlib.Path) -> dict[str, list[str]]:
  """Returns name of a table -> the pictures in it that exist."""
  return {
    record.artifact.name: [
      file.path
      for file in record.artifact.manifest.contents
      if file.path.startswith("media/images/") and pathlib.Path(file.local_path).is_file()
    ]
    for record in wandb_records(path)
    if record.WhichOneof("record_type") == "artifact"
  }


def trackio_lines(directory: pathlib.Path, project: str) -> dict[str, list[dict]]:
  """Returns name of a run -> what was logged, with its steps."""
  connection = sqlite3.connect(directory / f"{project}.db")
  found: dict[str, list[dict]] = {}
  for name, step, values in connection.execute(
    "select run_name, step, metrics from metrics order by id"
  ):
    found.setdefault(name, []).append({"step": step} | json.loads(values))
  connection.close()
  return found
