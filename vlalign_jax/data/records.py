"""Reads records, one conversation each, from a JSON array or JSON lines, and checks them."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER, Answers, Turn, parse
from vlalign_jax.data.images import image_path
from vlalign_jax.data.json_entries import as_text, entries, is_json_lines, kind, quote
from vlalign_jax.errors import InputError

_THREADS = 32  # existence checks wait for network disks, not for the processor


@dataclass(frozen=True, slots=True)
class Record:
  """One conversation; its questions hold as many `<image>` as it has images.

  Attributes:
    file: the path of its file, as in the config.
    index: its place in the JSON array, from 0; in JSON lines the line number, from 1.
    id: its `id` as text; the index if it has none.
    images: normalized paths below the image root, in the order of their placeholders.
    turns: at least one; only the last may lack its answer.
    answers: ranked answers to the last question, best first; the last turn then has no answer.
  """

  file: str
  index: int
  id: str
  images: tuple[str, ...]
  turns: tuple[Turn, ...]
  answers: tuple[str, ...] = ()

  @property
  def where(self) -> str:
    """Returns a name such as `data/train.json, record 17 ("id": "000123")`."""
    return _where(self.file, self.index, self.id)


def load_records(
  path: str,
  image_root: str | None = None,
  answers: Answers = "one",
  max_candidates: int | None = None,
) -> list[Record]:
  """Returns the records of a file for training; arguments as for `scan_records`.

  Raises:
    InputError: the file or a record is bad; names the first bad record and counts the others.
  """
  records, errors = scan_records(path, image_root, answers, max_candidates)
  if not errors:
    return records
  more = len(errors) - 1
  if not more:
    raise errors[0]
  noun = "record is" if more == 1 else "records are"
  raise InputError(f"{errors[0]}; {more} more {noun} bad: scripts/check_data.py lists them all")


def scan_records(
  path: str,
  image_root: str | None = None,
  answers: Answers = "one",
  max_candidates: int | None = None,
) -> tuple[list[Record], list[InputError]]:
  """Returns every usable record and one error for every bad one, both in file order.

  Args:
    path: a JSON array, or JSON lines if it ends with .jsonl or .ndjson.
    image_root: the directory that image paths are relative to; empty: that of `path`.
    answers: what the last question must have: "one" answer, "ranked" ones (at least two), or
      anything ("optional").
    max_candidates: the most ranked answers of a record; None for no limit.

  Raises:
    InputError: the file as a whole is unusable, or the image root is missing.
  """
  parsed: list[Record | InputError] = []
  for index, entry in entries(path):
    try:
      if isinstance(entry, InputError):
        raise entry
      parsed.append(parse_record(entry, path, index, answers, max_candidates))
    except InputError as error:
      parsed.append(error)

  root = image_root or os.path.dirname(path)
  images = {image for item in parsed if isinstance(item, Record) for image in item.images}
  missing = _missing(images, root)
  records, errors = [], []
  for item in parsed:
    if isinstance(item, InputError):
      errors.append(item)
    elif absent := [image for image in item.images if image in missing]:
      errors.append(
        InputError(
          f"{item.where}: image {quote(absent[0])} not found under {root or '.'};"
          " put it there or set data.images"
        )
      )
    else:
      records.append(item)
  return records, errors


def parse_record(
  entry: Any, file: str, index: int, answers: Answers, max_candidates: int | None
) -> Record:
  """Returns the record that an entry of a file holds; whether its images exist is not checked.

  Args:
    entry: parsed JSON.
    file, index: as of Record.
    answers, max_candidates: as for `scan_records`.

  Raises:
    InputError: the record is bad; the message names it.
  """
  value = entry.get("id") if isinstance(entry, dict) else None
  if value is None or isinstance(value, (dict, list)):
    identity = str(index)
  else:
    identity = value if isinstance(value, str) else json.dumps(value)
  where = _where(file, index, identity)
  try:
    if not isinstance(entry, dict):
      raise InputError(f"is {kind(entry)}, not an object")
    if isinstance(value, (dict, list)):
      raise InputError(f'"id" is {kind(value)}; give text or a number')
    as_text(identity, '"id"')
    images = _images(entry)
    conversation = parse(entry, answers, max_candidates)
    turns = conversation.turns
    placeholders = sum(turn.human.count(IMAGE_PLACEHOLDER) for turn in turns)
    if images and not placeholders:
      first = Turn(f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[0].human, turns[0].gpt)
      turns = (first, *turns[1:])
    elif placeholders != len(images):
      raise InputError(
        f"its questions hold {placeholders} {IMAGE_PLACEHOLDER} but it has {len(images)}"
        f' {"image" if len(images) == 1 else "images"}; make "image" and the questions agree'
      )
    for turn, place in zip(turns, conversation.places, strict=True):
      if not turn.human.strip():
        raise InputError(f"{place}: the question is empty; give it or drop the record")
  except InputError as error:
    raise InputError(f"{where}: {error}") from error
  return Record(file, index, identity, images, turns, conversation.answers)


def _images(entry: dict[str, Any]) -> tuple[str, ...]:
  keys = [key for key in ("image", "images") if entry.get(key)]
  if len(keys) > 1:
    raise InputError('has "image" and "images"; keep one of them')
  key = keys[0] if keys else "image"
  images = entry.get(key)
  if images is None:
    return ()
  paths = images if isinstance(images, list) else [images]
  for path in paths:
    if not isinstance(path, str):
      raise InputError(f'"{key}" holds {kind(path)}; give a path or a list of paths')
    as_text(path, f'"{key}"')
  return tuple(image_path("", path) for path in paths)


def _missing(images: Iterable[str], root: str) -> set[str]:
  """Returns the images that are not files below `root`."""
  images = sorted(images)
  if images and not os.path.isdir(root or "."):
    raise InputError(f"{root}: no such directory; set data.images to where the images are")

  def absent(part: list[str]) -> list[str]:
    return [image for image in part if not os.path.isfile(os.path.join(root, image))]

  with ThreadPoolExecutor(_THREADS) as pool:
    parts = pool.map(absent, [images[start::_THREADS] for start in range(_THREADS)])
    return {image for part in parts for image in part}


def _where(file: str, index: int, identity: str) -> str:
  place = f"{file}, {'line' if is_json_lines(file) else 'record'} {index}"
  return place if identity == str(index) else f'{place} ("id": {quote(identity)})'
