"""Keeps pictures that data files hold as files of their own, so that all else sees paths alone."""

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass

from vlalign_jax.errors import InputError

# How a picture's bytes begin -> the end of its file's name, for people who look at them.
_SUFFIXES = {
  b"\xff\xd8\xff": ".jpg",
  b"\x89PNG\r\n\x1a\n": ".png",
  b"GIF8": ".gif",
  b"RIFF": ".webp",
  b"BM": ".bmp",
  b"II*\x00": ".tiff",
  b"MM\x00*": ".tiff",
}
# How the base64 of a JPEG, PNG, GIF or WebP begins. The first looks like an absolute path.
_BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST_BASE64 = 60
_DATA_URI = re.compile(r"data:[\w.+/-]*(;[\w=.+-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class PictureStore:
  """A directory of pictures, each named by a hash of its bytes: equal pictures are one file."""

  directory: str

  def keep(self, content: bytes) -> str:
    """Writes a picture if it is not there and returns its absolute path.

    Raises:
      InputError: the directory cannot be written.
    """
    name = hashlib.blake2b(content, digest_size=16).hexdigest()
    suffix = next((end for head, end in _SUFFIXES.items() if content.startswith(head)), "")
    path = os.path.join(self.directory, name[:2], name + suffix)
    try:
      if os.path.getsize(path) == len(content):
        return path
    except OSError:
      pass
    partial = f"{path}.{os.getpid()}.part"  # hosts and runs may share the directory
    try:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(partial, "wb") as file:
        file.write(content)
      os.replace(partial, path)
    except OSError as error:
      raise InputError(
        f"data.cache {self.directory}: pictures of data files cannot be written there"
        f" ({error.strerror}); make room or name another directory"
      ) from error
    return path


def store(directory: str) -> PictureStore:
  """Returns the store of a config's data.cache; by default below the user's cache directory."""
  if not directory:
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    directory = os.path.join(caches, "vlalign_jax", "pictures")
  return PictureStore(os.path.abspath(os.path.expanduser(directory)))


def written_in_text(text: str) -> bytes | None:
  """Returns the bytes of a picture that a text spells as base64 or a data URI; None for a path.

  Raises:
    InputError: it is a data URI that cannot be decoded.
  """
  if text[:5].lower() == "data:":
    head = _DATA_URI.match(text)
    if not head:
      raise InputError("a data URI without ;base64; encode the picture anew")
    try:
      return base64.b64decode("".join(text[head.end() :].split()), validate=True)
    except binascii.Error as error:
      raise InputError(f"a damaged data URI ({error}); encode the picture anew") from error
  if len(text) < _SHORTEST_BASE64 or not text.startswith(_BASE64_HEADS):
    return None
  if not _BASE64.fullmatch(text):
    return None
  try:
    return base64.b64decode("".join(text.split()), validate=True)
  except binascii.Error:
    return None
