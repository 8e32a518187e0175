"""The one exception for what the user gave us: its message names the place and the mend."""


class InputError(ValueError):
  """A file, record, flag or directory is not usable; the message is shown without a traceback."""
