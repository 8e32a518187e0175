"""What every script shares: flags with config overrides, a quiet log, errors a user can read."""

import os
import runpy
import sys
import traceback
from logging import WARNING, LogRecord

from absl import app, flags, logging
from ml_collections import ConfigDict

import vlalign_jax
from vlalign_jax import out_of_memory, presets
from vlalign_jax.config import unknown_key
from vlalign_jax.errors import InputError
from vlalign_jax.sharding import processes

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def run(main, several_hosts: bool = False) -> None:
  """Runs `main(argv)` with flags parsed; an InputError ends it with one line and exit code 1.

  Args:
    main: what the script does; returns the exit code, None for 0.
    several_hosts: whether it may be one process of several, see `sharding.processes`; an error of
      one then ends all.
  """
  if several_hosts:
    processes.define_flags()

  def parse(argv):
    try:
      return _parse(argv)
    except InputError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(1)

  def guarded(argv):
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_worth_a_line)
    try:
      if several_hosts:
        processes.start(**{name: flags.FLAGS[name].value for name in processes.FLAGS})
      config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
      with out_of_memory.explained(out_of_memory.script(), config):
        return main(argv)
    except InputError as error:
      processes.fail(f"error: {error}", str(error))
      return 1
    except BaseException as error:
      if processes.are_several():
        told = "".join(traceback.format_exception_only(error)).strip()
        processes.fail(traceback.format_exc(), told)
      raise

  app.run(guarded, flags_parser=parse)


def _is_worth_a_line(record: LogRecord) -> bool:
  """Whether a log record is a warning or ours: Orbax tells more than 50 things a checkpoint."""
  ours = os.path.dirname(vlalign_jax.__file__), os.path.dirname(os.path.abspath(sys.argv[0]))
  return record.levelno >= WARNING or os.path.abspath(record.pathname).startswith(ours)


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; what users get wrong there becomes an InputError."""
  argv = presets.find_installed(argv)
  file = _config_file(argv)
  kinds = {} if file is None else _kinds(_load_config(file))
  _check_overrides(argv, file, kinds)
  try:
    rest = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    if f"config.{error.flagname}" in kinds:
      message = f"unknown flag --{error.flagname}; did you mean --config.{error.flagname}?"
      raise InputError(message) from error
    raise InputError(f"{error}; --help lists the flags") from error
  except flags.IllegalFlagValueError as error:
    for name, kind in kinds.items():
      if str(error).startswith(f"flag --{name}="):
        given = str(error).removeprefix(f"flag --{name}=").split(": ", 1)[0]
        raise InputError(f"{name} is {given!r}; give {_KINDS.get(kind, 'text')}") from error
    raise InputError(f"{error}; --help lists the flags") from error
  except flags.Error as error:
    raise InputError(f"{error}; --help lists the flags") from error
  if len(rest) > 1:
    raise InputError(f"{rest[1]!r} is no flag; config keys are set by --config.KEY=VALUE")
  return rest


def _flags(argv: list[str]) -> list[tuple[str, str | None]]:
  """(name, value or None) of everything that looks like a flag."""
  found = []
  for place, arg in enumerate(argv[1:], start=1):
    if arg == "--":
      break
    if arg.startswith("-"):
      name, equals, value = arg.lstrip("-").partition("=")
      found.append((name, value if equals else next(iter(argv[place + 1 :]), None)))
  return found


def _config_file(argv: list[str]) -> str | None:
  return next((value for name, value in reversed(_flags(argv)) if name == "config"), None)


def _load_config(path: str) -> ConfigDict:
  """What FILE.py or FILE.py:PRESET gives, before overrides."""
  file, *preset = path.split(":", 1)
  if not os.path.isfile(file):
    raise InputError(f"--config={path}: no file {file!r} below {os.getcwd()}")
  try:
    config = runpy.run_path(file)["get_config"](*preset)
  except InputError as error:
    raise InputError(f"--config={path}: {error}") from error
  except Exception as error:  # a config file is a program and fails as it likes
    reason = " ".join("".join(traceback.format_exception_only(error)).split())
    raise InputError(f"--config={path}: {reason}") from error
  if not isinstance(config, ConfigDict):
    given = type(config).__name__
    raise InputError(f"--config={path}: get_config gives a {given}, not a ConfigDict")
  return config


def _kinds(config: ConfigDict, prefix: str = "config") -> dict[str, type]:
  """Dotted key -> type of its values."""
  kinds = {}
  for key in config:
    path, kind = f"{prefix}.{key}", config.get_type(key)
    kinds |= _kinds(config[key], path) if issubclass(kind, ConfigDict) else {path: kind}
  return kinds


def _check_overrides(argv: list[str], file: str | None, kinds: dict[str, type]) -> None:
  for name, _ in _flags(argv):
    name = name.removeprefix("no") if name.startswith("noconfig.") else name
    if not name.startswith("config.") or name in kinds:
      continue
    if file is None:
      raise InputError(f"--{name} changes a config, and --config is missing")
    inside = [key for key in kinds if key.startswith(f"{name}.")]
    if inside:
      raise InputError(f"{name} is a group of keys; set them one by one, such as --{inside[0]}")
    raise InputError(unknown_key(name, list(kinds)))
