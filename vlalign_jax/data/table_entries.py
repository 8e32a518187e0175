"""Reads the rows of Parquet files and of saved `datasets` directories, a few at a time."""

import glob
import json
import os
from collections.abc import Iterator
from typing import Any

from vlalign_jax.errors import InputError

_ROWS = 128  # rows in memory at a time: they may hold pictures


def parquet(paths: list[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
  """Yields (number of the row over all files, "FILE, row N" or "row N", row) of Parquet files.

  Raises:
    InputError: a file is damaged.
  """
  import pyarrow.parquet as pq  # takes a second, and JSON does not need it

  def batches(path):
    # Without these two pyarrow reads a row group as a whole, which may be the whole file.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
      yield from file.iter_batches(_ROWS)

  yield from _rows(paths, batches)


def saved_dataset(path: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
  """Yields the same of a directory that `datasets.Dataset.save_to_disk` wrote.

  Raises:
    InputError: the directory holds several splits, or is damaged.
  """
  import pyarrow as pa

  def batches(file):
    with pa.memory_map(file) as source, pa.ipc.open_stream(source) as stream:
      for batch in stream:
        for start in range(0, batch.num_rows, _ROWS):
          yield batch.slice(start, _ROWS)

  yield from _rows(_arrow_files(path), batches)


def parquet_files(path: str) -> list[str]:
  """Returns the Parquet files of a directory or of a pattern such as DIR/train-*.parquet.

  Raises:
    InputError: a directory holds files of several splits.
  """
  if not os.path.isdir(path):
    return sorted(glob.glob(path))
  files = sorted(glob.glob(os.path.join(glob.escape(path), "*.parquet")))
  # The hub names shards train-00000-of-00010.parquet.
  splits = sorted({os.path.basename(file).split("-0", 1)[0] for file in files if "-of-" in file})
  if len(splits) > 1:
    raise InputError(
      f"{path}: holds the splits {', '.join(splits)}; name the files of one, such as"
      f" {os.path.join(path, splits[-1])}-*.parquet"
    )
  return files


def _arrow_files(path: str) -> list[str]:
  splits = os.path.join(path, "dataset_dict.json")
  if os.path.isfile(splits):
    with open(splits, encoding="utf-8") as file:
      names = json.load(file).get("splits", [])
    raise InputError(
      f"{path}: holds the splits {', '.join(names)}; name the directory of one, such as"
      f" {os.path.join(path, names[0] if names else 'train')}"
    )
  try:
    with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
      names = [part["filename"] for part in json.load(file)["_data_files"]]
  except (OSError, ValueError, KeyError, TypeError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise InputError(
      f"{path}: state.json cannot be read ({reason}); save the data again"
    ) from error
  return [os.path.join(path, name) for name in names]


def _rows(paths: list[str], batches) -> Iterator[tuple[int, str, dict[str, Any]]]:
  import pyarrow as pa

  number = 0
  for path in paths:
    prefix = f"{os.path.basename(path)}, " if len(paths) > 1 else ""
    row = 0
    try:
      for batch in batches(path):
        for values in batch.to_pylist():
          yield number, f"{prefix}row {row}", values
          number, row = number + 1, row + 1
    except (OSError, pa.ArrowException) as error:
      reason = " ".join(str(error).split())
      raise InputError(f"{path}: row {row}: cannot be read ({reason}); replace the file") from error
