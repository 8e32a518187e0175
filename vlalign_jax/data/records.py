"""Reads the records of a data file, one conversation each, and checks them."""

import collections
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from absl import logging

from vlalign_jax.data import bad_records, conversations, picture_store, pictures
from vlalign_jax.data.columns import columns_of
from vlalign_jax.data.conversations import Answers, Turn
from vlalign_jax.data.entries import entries
from vlalign_jax.data.placeholders import place_images
from vlalign_jax.data.values import as_text, kind, quote
from vlalign_jax.errors import InputError

_THREADS = 32  # existence checks wait for network disks, not for the processor


@dataclass(frozen=True, slots=True)
class Record:
  """One conversation; its questions hold as many `<image>` as it has images.

  Attributes:
    file: the path of its file, as in the config.
    index: its number in the file, see `entries.entries`.
    id: its `id` (or `idx`) as text; the index if it has none.
    images: in the order of their placeholders: normalized paths below `root`; absolute ones of
      pictures that the file holds.
    turns: at least one; only the last may lack its answer.
    answers: ranked answers to the last question, best first; the last turn then has no answer.
    system: the text that replaces the template's own system text; None: the template's.
    columns: what else the record has, by key, for reward functions; None if it is not kept.
    place: its name within the file, such as "record 17" or "line 17".
    root: the directory that `images` are relative to.
    image_sizes: (width, height) of each of `images`, None where its header cannot be read; empty
      where nothing depends on it.
  """

  file: str
  index: int
  id: str
  images: tuple[str, ...]
  turns: tuple[Turn, ...]
  answers: tuple[str, ...] = ()
  system: str | None = None
  columns: dict[str, Any] | None = field(default=None, compare=False)
  place: str = field(default="", compare=False)
  root: str = field(default="", compare=False)
  image_sizes: tuple[tuple[int, int] | None, ...] = field(default=(), compare=False)

  @property
  def where(self) -> str:
    """Returns a name such as `data/train.json, record 17 ("id": "000123")`."""
    return _where(self.file, self.place or f"record {self.index}", self.index, self.id)

  @property
  def image_files(self) -> tuple[str, ...]:
    """Returns the paths of `images` from the working directory."""
    return tuple(os.path.join(self.root, image) for image in self.images)

  @property
  def content(self) -> tuple:
    """Returns what a model reads of the record, and which pictures; for digests."""
    # Pictures that the file holds are named by their content, wherever they are kept.
    names = tuple(os.path.basename(i) if os.path.isabs(i) else i for i in self.images)
    return names, self.turns, self.answers, *((self.system,) if self.system else ())


@dataclass(frozen=True)
class Options:
  """How the records of a config are read.

  Attributes:
    image_root: the directory that image paths are relative to; empty: that of the file.
    answers: what the last question must have: "one" answer, "ranked" ones (at least two), or
      anything ("optional").
    max_candidates: the most ranked answers of a record; None for no limit.
    placeholders: what happens where `<image>` and the pictures do not match: "match" is an error,
      "first" puts the pictures before the first question.
    cache: directory of pictures that files hold, see `picture_store.store`.
    on_bad_record: "error", or "skip": leave bad records out.
    max_bad_records: the largest share of records that may be left out.
    keeps_columns: whether `Record.columns` is kept.
  """

  image_root: str = ""
  answers: Answers = "one"
  max_candidates: int | None = None
  placeholders: str = "match"
  cache: str = ""
  on_bad_record: str = "error"
  max_bad_records: float = bad_records.MAX_SHARE
  keeps_columns: bool = False


DEFAULT = Options()


class Scan(NamedTuple):
  """The usable records of a file, an error for every other one, and how often keys are not read."""

  records: list[Record]
  errors: list[InputError]
  unread: collections.Counter[str]


def load_records(path: str, options: Options = DEFAULT) -> list[Record]:
  """Returns the records of a file for training.

  Bad records that the options leave out are logged and counted, and so are keys that nothing reads.

  Raises:
    InputError: the file or a record is bad; names the first bad record and counts the others.
  """
  records, errors, unread = scan_records(path, options)
  if errors and options.on_bad_record != "skip":
    more = len(errors) - 1
    if not more:
      raise errors[0]
    noun = "record is" if more == 1 else "records are"
    raise InputError(f"{errors[0]}; {more} more {noun} bad: scripts/check_data.py lists them all")
  bad_records.warn(path, errors)
  bad_records.check(path, len(errors), len(errors) + len(records), options)
  if unread and not options.keeps_columns:
    logging.info("%s: keys that nothing reads: %s", path, count_keys(unread))
  return records


def count_keys(unread: collections.Counter[str]) -> str:
  """Returns keys with how many records have each, such as `source (20,000), split (3)`."""
  shown = [f"{key} ({count:,})" for key, count in unread.most_common(10)]
  more = len(unread) - len(shown)
  return ", ".join(shown) + (f" and {more} more" if more else "")


def scan_records(path: str, options: Options = DEFAULT) -> Scan:
  """Reads a whole file, in any of the forms of `entries.entries`; a bad record raises no error.

  Raises:
    InputError: the file as a whole is unusable, or the image root is missing.
  """
  parsed: list[Record | InputError] = []
  unread: collections.Counter[str] = collections.Counter()
  root = options.image_root or (path if os.path.isdir(path) else os.path.dirname(path))
  options = replace(options, image_root=root)
  for index, place, entry in entries(path):
    try:
      if isinstance(entry, InputError):
        raise entry
      record, keys = parse_record(entry, path, index, place, options)
      parsed.append(record)
      unread.update(keys)
    except InputError as error:
      parsed.append(error)

  images = {image for item in parsed if isinstance(item, Record) for image in item.images}
  missing = _missing({image for image in images if not os.path.isabs(image)}, root)
  records, errors = [], []
  for item in parsed:
    if isinstance(item, InputError):
      errors.append(item)
    elif absent := [image for image in item.images if image in missing]:
      hint = "; write / between directories" if "\\" in absent[0] else ""
      errors.append(
        InputError(
          f"{item.where}: image {quote(absent[0])} not found under {root or '.'};"
          f" put it there or set data.images{hint}"
        )
      )
    else:
      records.append(item)
  return Scan(records, errors, unread)


def parse_record(
  entry: Any, file: str, index: int, place: str, options: Options
) -> tuple[Record, list[str]]:
  """Parses an entry of a file; whether its images exist is not checked.

  Args:
    entry: parsed JSON, or a row of a table.
    file, index, place: as in Record.
    options: how it is read; its image_root is the directory of the images, even if empty.

  Returns:
    (the record, the keys of the entry that nothing reads).

  Raises:
    InputError: the record is bad; the message names it.
  """
  value = None
  if isinstance(entry, dict):
    value = entry.get("id") if entry.get("id") is not None else entry.get("idx")
  if value is None or isinstance(value, (dict, list, bytes)):
    identity = str(index)
  else:
    identity = value if isinstance(value, str) else json.dumps(value, default=str)
  try:
    if not isinstance(entry, dict):
      raise InputError(f"is {kind(entry)}, not an object")
    if isinstance(value, (dict, list, bytes)):
      raise InputError(f'"id" is {kind(value)}; give text or a number')
    as_text(identity, '"id"')
    root, store = options.image_root, picture_store.store(options.cache)
    images = pictures.of_record(entry, root, store)
    conversation = conversations.parse(entry, options.answers, options.max_candidates)
    turns, images = place_images(conversation, images, options.placeholders, root, store)
    for turn, question in zip(turns, conversation.places, strict=True):
      if not turn.human.strip():
        raise InputError(f"{question}: the question is empty; give it or drop the record")
  except InputError as error:
    raise InputError(f"{_where(file, place, index, identity)}: {error}") from error
  columns = columns_of(entry, images) if options.keeps_columns else None
  record = Record(
    file=file,
    index=index,
    id=identity,
    images=images,
    turns=turns,
    answers=conversation.answers,
    system=conversation.system,
    columns=columns,
    place=place,
    root=root,
  )
  known = {"id", "idx", *pictures.KEYS, *conversation.keys}
  return record, [key for key, value in entry.items() if key not in known and value is not None]


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


def _where(file: str, place: str, index: int, identity: str) -> str:
  where = f"{file}, {place}"
  return where if identity == str(index) else f'{where} ("id": {quote(identity)})'
