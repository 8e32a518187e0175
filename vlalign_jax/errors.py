"""Defines InputError, the one exception for mistakes in what the user provides."""


class InputError(ValueError):
  """A file, record, flag or directory is unusable; the message says where and how to fix it."""
