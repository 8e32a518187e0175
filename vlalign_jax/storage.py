"""Reads and writes places: local directories, or URLs of a bucket such as gs://bucket/runs/sft.

A bucket has neither append nor rename. Files that grow are therefore kept in a local directory and
copied to the bucket in full; each appears there at once.
"""

import contextlib
import functools
import importlib.util
import os
import tempfile

from etils import epath

from vlalign_jax.errors import InputError

SCHEMES = ("gs",)  # those that Orbax supports
# Modules that gs:// needs: the first for small files, the second for Orbax.
_MODULES = ("gcsfs", "google.cloud.storage")
_INSTALL = "pip install gcsfs google-cloud-storage"


def is_url(place: str) -> bool:
  """Returns whether a place is a URL and not a local path."""
  return "://" in os.fspath(place)


def absolute(place: str) -> str:
  """Returns the place as an absolute path, or the URL without a trailing slash."""
  return place.rstrip("/") if is_url(place) else os.path.abspath(place)


def check(place: str, name: str) -> None:
  """Refuses a URL that cannot be used here.

  Args:
    place: a directory or a URL.
    name: the flag or config key that it comes from.

  Raises:
    InputError: the scheme of the URL is not supported, or a library for it is missing.
  """
  if not is_url(place):
    return
  scheme = place.split("://", 1)[0]
  if scheme not in SCHEMES:
    raise InputError(
      f"{name} {place}: only gs:// is supported; mount other storage and give the path there"
    )
  if any(not _is_installed(module) for module in _MODULES):
    raise InputError(f"{name} {place} needs libraries that are missing: {_INSTALL}")


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its package is missing
    return False


def write(place: str, content: str | bytes) -> None:
  """Writes a file atomically: if the process dies, the file has its old or its new content."""
  content = content.encode() if isinstance(content, str) else content
  if is_url(place):
    epath.Path(place).write_bytes(content)
    return
  partial = f"{place}.partial"
  with open(partial, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, place)


def upload(directory: str, place: str) -> None:
  """Copies the files of a directory, without subdirectories, to a URL; overwrites files there."""
  target = epath.Path(place)
  target.mkdir(parents=True, exist_ok=True)
  for file in epath.Path(directory).iterdir():
    (target / file.name).write_bytes(file.read_bytes())


@contextlib.contextmanager
def written(place: str):
  """Yields a local directory to write to; its files are at `place` when the block ends."""
  if not is_url(place):
    yield place
    return
  with tempfile.TemporaryDirectory() as directory:
    yield directory
    upload(directory, place)


def local(place: str) -> str:
  """Returns a local directory with the files of `place`; a downloaded copy lasts until exit."""
  return _downloaded(place).name if is_url(place) else place


@functools.cache
def _downloaded(place: str) -> tempfile.TemporaryDirectory:
  directory = tempfile.TemporaryDirectory()
  for file in epath.Path(place).iterdir():
    if not file.is_dir():
      (epath.Path(directory.name) / file.name).write_bytes(file.read_bytes())
  return directory
