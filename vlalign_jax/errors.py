"""Defines InputError, the one exception for mistakes in what the user provides."""


class InputError(ValueError):
  """A file, record, flag or directory is unusable; the message says where and how to fix it."""


def shorten(text: str, length: int = 100) -> str:
  """Returns a text as an error shows it: on one line, the middle left out if it is longer."""
  text = " ".join(text.split())
  if len(text) <= length:
    return text
  tail = min(20, length // 4)
  return f"{text[: length - tail - 3]}...{text[len(text) - tail :]}"
