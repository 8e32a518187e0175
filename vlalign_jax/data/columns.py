"""The columns of a record that reward functions see, without the pictures inside."""

from typing import Any

from vlalign_jax.data import pictures


def columns_of(entry: dict[str, Any], images: tuple[str, ...]) -> dict[str, Any]:
  """Returns an entry's columns as reward functions get them: paths in place of pictures' bytes.

  Args:
    entry: of a data file.
    images: paths of its pictures.
  """
  columns = {key: _without_bytes(value) for key, value in entry.items()}
  for key in pictures.KEYS:
    if columns.get(key) is not None:
      columns[key] = list(images) if isinstance(columns[key], list) else next(iter(images), None)
  return columns


def _without_bytes(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _without_bytes(part) for key, part in value.items()}
  if isinstance(value, list):
    return [_without_bytes(part) for part in value]
  is_picture = isinstance(value, bytes) or (isinstance(value, str) and value[:5] == "data:")
  return None if is_picture else value
