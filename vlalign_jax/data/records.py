"""Records in the LLaVA format (JSON array or JSON lines), checked on reading."""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vlalign_jax.data.images import image_path
from vlalign_jax.errors import InputError

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_THREADS = 32  # existence checks wait for network disks, not for the processor


@dataclass(frozen=True, slots=True)
class Turn:
  """A question, its `<image>` placeholders still inside, and its answer (None: to be generated)."""

  human: str
  gpt: str | None


@dataclass(frozen=True, slots=True)
class Record:
  """One conversation; its questions hold as many `<image>` as it has images.

  Attributes:
    file: the file it is from, as given.
    index: its place in the JSON array, from 0; in JSON lines the line number, from 1.
    id: its `id` as text; the index where it has none.
    images: normalised paths below the image root, in the order of their placeholders.
    turns: at least one; only the last may lack its answer.
  """

  file: str
  index: int
  id: str
  images: tuple[str, ...]
  turns: tuple[Turn, ...]

  @property
  def where(self) -> str:
    """Such as `data/train.json, record 17 ("id": "000123")`."""
    return _where(self.file, self.index, self.id)


def load_records(
  path: str, image_root: str | None = None, require_answer: bool = True
) -> list[Record]:
  """As `scan_records`, for training: the first bad record is an error.

  Raises:
    InputError: for the file or its first bad record, with the number of the others.
  """
  records, errors = scan_records(path, image_root, require_answer)
  if not errors:
    return records
  more = len(errors) - 1
  if not more:
    raise errors[0]
  noun = "record is" if more == 1 else "records are"
  raise InputError(f"{errors[0]}; {more} more {noun} bad: scripts/check_data.py lists them all")


def scan_records(
  path: str, image_root: str | None = None, require_answer: bool = True
) -> tuple[list[Record], list[InputError]]:
  """Reads every usable record, and one error for every other, both in file order.

  Args:
    path: a JSON array, or JSON lines if it ends with .jsonl or .ndjson.
    image_root: the directory that image paths are relative to; empty: that of `path`.
    require_answer: whether the last question, too, must have its answer.

  Raises:
    InputError: the file as a whole is unusable, or the image root is missing.
  """
  parsed: list[Record | InputError] = []
  for index, entry in _entries(path):
    try:
      if isinstance(entry, InputError):
        raise entry
      parsed.append(_parse(entry, path, index, require_answer))
    except InputError as error:
      parsed.append(error)

  root = image_root or os.path.dirname(path)
  good = [one for one in parsed if isinstance(one, Record)]
  missing = _missing({image for record in good for image in record.images}, root)
  records, errors = [], []
  for one in parsed:
    if isinstance(one, InputError):
      errors.append(one)
    elif gone := [image for image in one.images if image in missing]:
      errors.append(
        InputError(
          f"{one.where}: image {_quote(gone[0])} not found under {root or '.'};"
          " put it there or set data.images"
        )
      )
    else:
      records.append(one)
  return records, errors


def _entries(path: str) -> Iterator[tuple[int, Any]]:
  """(index, parsed JSON) of every record; an InputError in place of a malformed line."""
  text = _read_text(path)
  if not text.strip():
    raise InputError(f"{path}: the file is empty; give a list of records")
  if not _is_json_lines(path):
    try:
      entries = json.loads(text)
    except json.JSONDecodeError as error:
      hint = "; name it .jsonl if it holds JSON lines" if error.msg == "Extra data" else "; mend it"
      place = f"line {error.lineno}, column {error.colno}"
      raise InputError(f"{path}: malformed JSON at {place} ({error.msg}){hint}") from error
    except (ValueError, RecursionError) as error:
      raise InputError(f"{path}: malformed JSON ({error}); mend it") from error
    if not isinstance(entries, list):
      raise InputError(f"{path}: holds {_kind(entries)}, not a list of records; wrap it in [ ]")
    if not entries:
      raise InputError(f"{path}: the list of records is empty; give at least one")
    yield from enumerate(entries)
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


def _parse(entry: Any, file: str, index: int, require_answer: bool) -> Record:
  """One entry of the file -> a Record, its images not looked for yet."""
  given = entry.get("id") if isinstance(entry, dict) else None
  if given is None or isinstance(given, (dict, list)):
    identity = str(index)
  else:
    identity = given if isinstance(given, str) else json.dumps(given)
  where = _where(file, index, identity)
  try:
    if not isinstance(entry, dict):
      raise InputError(f"is {_kind(entry)}, not an object")
    if isinstance(given, (dict, list)):
      raise InputError(f'"id" is {_kind(given)}; give text or a number')
    _text(identity, '"id"')
    images = _images(entry)
    turns = _turns(entry, require_answer)
    placeholders = sum(turn.human.count(IMAGE_PLACEHOLDER) for turn in turns)
    if images and not placeholders:
      first = Turn(f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[0].human, turns[0].gpt)
      turns = (first, *turns[1:])
    elif placeholders != len(images):
      raise InputError(
        f"its questions hold {placeholders} {IMAGE_PLACEHOLDER} but it has {len(images)}"
        f' {"image" if len(images) == 1 else "images"}; make "image" and the questions agree'
      )
    for number, turn in enumerate(turns):
      if not turn.human.strip():
        raise InputError(f'conversations[{2 * number}]: the question is empty; give its "value"')
  except InputError as error:
    raise InputError(f"{where}: {error}") from error
  return Record(file, index, identity, images, turns)


def _images(entry: dict[str, Any]) -> tuple[str, ...]:
  if entry.get("images") and "image" not in entry:
    raise InputError('has "images", which is not read; rename it to "image"')
  images = entry.get("image")
  if images is None:
    return ()
  paths = images if isinstance(images, list) else [images]
  for path in paths:
    if not isinstance(path, str):
      raise InputError(f'"image" holds {_kind(path)}; give a path or a list of paths')
    _text(path, '"image"')
  return tuple(image_path("", path) for path in paths)


def _turns(entry: dict[str, Any], require_answer: bool) -> tuple[Turn, ...]:
  messages = entry.get("conversations")
  if not isinstance(messages, list) or not messages:
    state = _kind(messages) if messages else "empty" if "conversations" in entry else "missing"
    raise InputError(f'"conversations" is {state}; give a list of human and gpt messages')
  values = []
  for number, message in enumerate(messages):
    place = f"conversations[{number}]"
    if not isinstance(message, dict):
      raise InputError(f'{place} is {_kind(message)}; give {{"from": ..., "value": ...}}')
    role, expected = message.get("from"), ("human", "gpt")[number % 2]
    if not isinstance(role, str) or _ROLES.get(role) != expected:
      raise InputError(
        f'{place}: "from" is {_quote(role)} where "{expected}" is expected;'
        " human and gpt take turns, human first"
      )
    values.append(_text(message.get("value"), f'{place}: "value"'))
    if expected == "gpt" and not values[-1].strip():
      raise InputError(f"{place}: the answer is empty; give it or drop the record")
    if expected == "gpt" and IMAGE_PLACEHOLDER in values[-1]:
      raise InputError(f"{place}: the answer holds {IMAGE_PLACEHOLDER}; only questions may")
  if len(values) % 2 and require_answer:
    raise InputError(f"conversations[{len(values) - 1}]: the last question has no answer; add it")
  answers = [*values[1::2], None][: (len(values) + 1) // 2]
  return tuple(Turn(human, gpt) for human, gpt in zip(values[::2], answers, strict=True))


def _missing(images: Iterable[str], root: str) -> set[str]:
  """Those of `images` that are no file below `root`."""
  images = sorted(images)
  if images and not os.path.isdir(root or "."):
    raise InputError(f"{root}: no such directory; set data.images to where the images are")

  def absent(part: list[str]) -> list[str]:
    return [image for image in part if not os.path.isfile(os.path.join(root, image))]

  with ThreadPoolExecutor(_THREADS) as pool:
    parts = pool.map(absent, [images[start::_THREADS] for start in range(_THREADS)])
    return {image for part in parts for image in part}


def _where(file: str, index: int, identity: str) -> str:
  place = f"{file}, {'line' if _is_json_lines(file) else 'record'} {index}"
  return place if identity == str(index) else f'{place} ("id": {_quote(identity)})'


def _is_json_lines(path: str) -> bool:
  return path.lower().endswith((".jsonl", ".ndjson"))


def _text(value: Any, name: str) -> str:
  if not isinstance(value, str):
    raise InputError(f"{name} is {_kind(value)}; give text")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; tokenizers cannot
    raise InputError(f"{name} holds half a surrogate pair; remove it") from error
  return value


def _kind(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
  return names.get(type(value), "a number")


def _quote(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  text = text if len(text) <= 100 else f"{text[:97]}..."
  return text.encode(errors="backslashreplace").decode()
