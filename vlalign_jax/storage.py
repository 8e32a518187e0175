"""Places of a run: directories, or URLs of a bucket such as gs://bucket/runs/sft.

A bucket knows neither append nor rename. What is written to piece by piece is therefore kept in a
directory of this machine and copied as whole files, each of which appears at once.
"""

import contextlib
import functools
import importlib.util
import os
import tempfile

from etils import epath

from vlalign_jax.errors import InputError

SCHEMES = ("gs",)  # what Orbax takes
# Modules behind gs://, for small files and for Orbax.
_MODULES = ("gcsfs", "google.cloud.storage")
_INSTALL = "pip install gcsfs google-cloud-storage"


def is_url(place: str) -> bool:
  """Whether a place is no directory of this machine."""
  return "://" in os.fspath(place)


def absolute(place: str) -> str:
  """A place that does not depend on where the command is started from."""
  return place.rstrip("/") if is_url(place) else os.path.abspath(place)


def check(place: str, name: str) -> None:
  """Refuses a URL that cannot be used here.

  Args:
    place: a directory or a URL.
    name: the flag or config key that it is from.

  Raises:
    InputError: the URL is of another kind, or a library for it is missing.
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
  except ModuleNotFoundError:  # not even its package
    return False


def write(place: str, content: str | bytes) -> None:
  """Writes a file that has its old or its new content, whenever the process dies."""
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
  """Copies the files of a directory to a URL, over what is there; no directories below it."""
  target = epath.Path(place)
  target.mkdir(parents=True, exist_ok=True)
  for file in epath.Path(directory).iterdir():
    (target / file.name).write_bytes(file.read_bytes())


@contextlib.contextmanager
def written(place: str):
  """A directory to write to; what it then holds stands at `place`."""
  if not is_url(place):
    yield place
    return
  with tempfile.TemporaryDirectory() as directory:
    yield directory
    upload(directory, place)


def local(place: str) -> str:
  """A directory with the files of `place`: itself, or a copy that lasts as long as the process."""
  return _downloaded(place).name if is_url(place) else place


@functools.cache
def _downloaded(place: str) -> tempfile.TemporaryDirectory:
  directory = tempfile.TemporaryDirectory()
  for file in epath.Path(place).iterdir():
    if not file.is_dir():
      (epath.Path(directory.name) / file.name).write_bytes(file.read_bytes())
  return directory
