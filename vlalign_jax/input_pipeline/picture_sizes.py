"""Reads the sizes of pictures from their headers, once, for models whose tokens depend on them."""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from absl import logging
from etils import epath

from vlalign_jax import storage
from vlalign_jax.data import images
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError

FILE = "picture_sizes.json"  # in the run directory
THREADS = 32


def with_sizes(
  records: Sequence[Record], layout: PictureLayout, workdir: str = ""
) -> Sequence[Record]:
  """Returns the records with the sizes of their pictures, if the layout depends on them.

  A picture whose header cannot be read has no size; encoding its record then says why.

  Args:
    records: of a run.
    layout: of its model.
    workdir: the run directory, whose FILE keeps the sizes; empty: they are not kept.
  """
  if not layout.by_size:
    return records
  sizes = _sizes({path for record in records for path in record.image_files}, workdir)
  return [
    dataclasses.replace(record, image_sizes=tuple(sizes[path] for path in record.image_files))
    for record in records
  ]


def _sizes(paths: set[str], workdir: str) -> dict[str, tuple[int, int] | None]:
  """Returns path -> (width, height), or None if the header cannot be read."""
  file = epath.Path(workdir) / FILE if workdir else None
  kept = json.loads(file.read_text()) if file and file.exists() else {}
  sizes: dict[str, tuple[int, int] | None] = {
    path: (width, height) for path, (width, height) in kept.items()
  }
  missing = sorted(paths - sizes.keys())
  if not missing:
    return sizes
  logging.info("reading the sizes of %d pictures", len(missing))
  with ThreadPoolExecutor(THREADS) as pool:  # it waits for files, not for processors
    sizes |= dict(zip(missing, pool.map(_size, missing), strict=True))
  if file and jax.process_index() == 0:
    known = {path: size for path, size in sizes.items() if size is not None}
    storage.write(str(file), json.dumps(known))
  return sizes


def _size(path: str) -> tuple[int, int] | None:
  try:
    return images.size(path)
  except InputError:
    return None
