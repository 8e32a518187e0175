"""What every script shares: flags with config overrides, and errors a user can read."""

import difflib
import sys

from absl import app, flags, logging

from vlalign_jax.errors import InputError


def _dotted(config, prefix: str = "config") -> list[str]:
  keys = []
  for key in config:
    path = f"{prefix}.{key}"
    keys += _dotted(config[key], path) if hasattr(config[key], "keys") else [path]
  return keys


def unknown_key(name: str, known: list[str]) -> str:
  """The message for a key that no config has, with the nearest one that exists."""
  last = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
  near = difflib.get_close_matches(name, known, 1, 0.8)
  near = near or [last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)]
  near = near or difflib.get_close_matches(name, known, 1, 0.0)
  return f"unknown key {name}; did you mean {near[0]}?"


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:  # ml_collections on an override of no such key
    overrides = [arg for arg in argv if arg.startswith(("--config.", "-config."))]
    flags.FLAGS(arg for arg in argv if arg not in overrides)
    known = _dotted(flags.FLAGS.config)
    for override in overrides:
      name = override.lstrip("-").split("=", 1)[0]
      if name not in known:
        raise InputError(unknown_key(name, known)) from error
    raise
  except flags.Error as error:
    raise InputError(f"{error}; --help lists the flags") from error
  except OSError as error:
    raise InputError(f"--config: {error.strerror or error}: no such config file") from error


def run(main) -> None:
  """Runs `main(argv)` with flags parsed; an InputError ends it with one line and exit code 1."""

  def parse(argv):
    try:
      return _parse(argv)
    except InputError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(1)

  def guarded(argv):
    logging.set_verbosity(logging.INFO)
    try:
      return main(argv)
    except InputError as error:
      print(f"error: {error}", file=sys.stderr)
      return 1

  app.run(guarded, flags_parser=parse)
