"""Finds the pictures of a record: paths below the image root, or pictures that the record holds."""

import os
import re
from typing import Any

from vlalign_jax.data.picture_store import PictureStore, written_in_text
from vlalign_jax.data.values import as_text, kind, quote
from vlalign_jax.errors import InputError

KEYS = ("image", "images", "image_path")
_PART_KEYS = ("image", "url", "path", "base64", "bytes")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def of_record(entry: dict[str, Any], root: str, store: PictureStore) -> tuple[str, ...]:
  """Returns the pictures that a record names next to its messages, in order.

  Args:
    entry: the record; `image`, `images` or `image_path` is a picture as for `locate`, or a list.
    root: the directory that paths are relative to.
    store: where pictures that the record holds are kept.

  Returns:
    Normalized paths below `root`, and absolute paths of kept pictures.

  Raises:
    InputError: a picture cannot be used, or the record has video or audio.
  """
  for key in _OTHER_MEDIA:
    if entry.get(key):
      raise InputError(f'has "{key}"; only pictures can be learned from, so drop the record')
  named = [key for key in ("image", "images") if entry.get(key) not in (None, [])]
  if len(named) > 1:
    raise InputError('has "image" and "images"; keep one of them')
  key = named[0] if named else "image_path"
  value = entry.get(key)
  if value is None or (key == "image_path" and value == ""):
    return ()
  values = value if isinstance(value, list) else [value]
  return tuple(locate(one, f'"{key}"', root, store) for one in values)


def locate(value: Any, name: str, root: str, store: PictureStore) -> str:
  """Returns the path of one picture.

  Args:
    value: a path below `root` (relative or absolute), bytes, base64, a data URI, or an object with
      `bytes` or `path`, as `datasets` writes it.
    name: how errors call it.
    root, store: as for `of_record`.

  Raises:
    InputError: it is something else, a URL for example.
  """
  if isinstance(value, dict):
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is None:
      raise InputError(f'{name} holds an object without "bytes" and "path"; give a path')
    if isinstance(content, str) and not (content := written_in_text(content)):
      raise InputError(f'{name}: "bytes" is text that is not a picture in base64; give a path')
    value = path if content is None else content
  if isinstance(value, bytes):
    return store.keep(value)
  if not isinstance(value, str):
    raise InputError(f"{name} holds {kind(value)}; give a path or a list of paths")
  as_text(value, name)
  try:
    content = written_in_text(value)
  except InputError as error:
    raise InputError(f"{name} holds {error}") from error
  return below(value, root) if content is None else store.keep(content)


def below(path: str, root: str) -> str:
  """Returns a path in its normal form below `root`, without access to the disk.

  `..` is resolved by name only, so a symbolic link inside the root may lead elsewhere.

  Raises:
    InputError: it is empty, a URL, or leads out of the root.
  """
  path = path.removeprefix("file://")
  shown = f"image {quote(path)}"
  if not path:
    raise InputError('image "" is an empty path; name the file relative to data.images')
  if _URL.match(path):
    raise InputError(
      f"{shown} is a URL, and pictures must be local: download it below data.images (wget,"
      " img2dataset) and give its path"
    )
  is_absolute = os.path.isabs(path)
  normal = os.path.relpath(path, os.path.abspath(root or ".")) if is_absolute else path
  normal = os.path.normpath(normal)
  if normal.split(os.sep, 1)[0] != os.pardir:
    return normal
  if is_absolute:
    raise InputError(
      f"{shown} is an absolute path outside of data.images ({root or '.'}); set data.images to a"
      " directory above it"
    )
  raise InputError(f"{shown} leaves the image root; move it there or set data.images")


def of_part(content: dict[str, Any]) -> Any:
  """Returns the picture that a message's part of type image or image_url holds; None: the next one.

  The part may spell it as OpenAI (`image_url`) or as transformers (`image`, `url`, `path`).
  """
  value = content.get("image_url")
  value = value.get("url") if isinstance(value, dict) else value
  return next((v for v in (value, *map(content.get, _PART_KEYS)) if v is not None), None)
