"""Runs a script's main function: flags with config overrides, a short log, one-line errors."""

import os
import runpy
import sys
import traceback
from logging import WARNING, LogRecord
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

import vlalign_jax
from vlalign_jax import out_of_memory, presets
from vlalign_jax.config import unknown_key
from vlalign_jax.errors import InputError
from vlalign_jax.sharding import processes

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def run(main, several_hosts: bool = False, arguments: bool = False) -> None:
  """Parses the flags and calls `main(argv)`; an InputError becomes one line and exit code 1.

  Args:
    main: the script's function; returns the exit code, None for 0.
    several_hosts: whether the script may run as several processes, see `sharding.processes`; an
      error in one then ends all.
    arguments: whether `main` takes arguments that are not flags, which may come between flags.
  """
  if several_hosts:
    processes.define_flags()

  def parse(argv):
    try:
      return _parse(argv, arguments)
    except InputError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(1)

  def guarded(argv):
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_logged)
    try:
      if several_hosts:
        values: Any = {name: flags.FLAGS[name].value for name in processes.FLAGS}
        processes.start(**values)
      config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
      with out_of_memory.explained(out_of_memory.script(), config):
        return main(argv)
    except InputError as error:
      processes.fail(f"error: {error}", str(error))
      return 1
    except BaseException as error:
      if processes.are_several():
        reason = "".join(traceback.format_exception_only(error)).strip()
        processes.fail(traceback.format_exc(), reason)
      raise

  app.run(guarded, flags_parser=parse)


def _is_logged(record: LogRecord) -> bool:
  """Returns whether a record is a warning or of this code: Orbax logs 50 lines per checkpoint."""
  ours = os.path.dirname(vlalign_jax.__file__), os.path.dirname(os.path.abspath(sys.argv[0]))
  return record.levelno >= WARNING or os.path.abspath(record.pathname).startswith(ours)


def _parse(argv: list[str], arguments: bool = False) -> list[str]:
  """Parses the flags and returns the rest of the command line; mistakes raise an InputError."""
  argv = presets.find_installed(argv)
  file = _config_file(argv)
  types = {} if file is None else _key_types(_load_config(file))
  _check_overrides(argv, file, types)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise InputError(_explain(error, types)) from error
  if len(rest) > 1 and not arguments:
    raise InputError(f"{rest[1]!r} is not a flag; set config keys with --config.KEY=VALUE")
  return rest


def _explain(error: flags.Error, types: dict[str, type]) -> str:
  """Returns the message for an error of the flags; types: of the config's keys."""
  if isinstance(error, flags.UnrecognizedFlagError) and f"config.{error.flagname}" in types:
    return f"unknown flag --{error.flagname}; did you mean --config.{error.flagname}?"
  for name, key_type in types.items():
    if str(error).startswith(f"flag --{name}="):
      value = str(error).removeprefix(f"flag --{name}=").split(": ", 1)[0]
      return f"{name} is {value!r}; it must be {_TYPE_NAMES.get(key_type, 'text')}"
  return f"{error}; --help lists the flags"


def _flags(argv: list[str]) -> list[tuple[str, str | None]]:
  """Returns (name, value or None) of every argument that looks like a flag."""
  pairs = []
  for i, arg in enumerate(argv[1:], start=1):
    if arg == "--":
      break
    if arg.startswith("-"):
      name, equals, value = arg.lstrip("-").partition("=")
      pairs.append((name, value if equals else next(iter(argv[i + 1 :]), None)))
  return pairs


def _config_file(argv: list[str]) -> str | None:
  return next((value for name, value in reversed(_flags(argv)) if name == "config"), None)


def _load_config(path: str) -> ConfigDict:
  """Returns the config of FILE.py or FILE.py:PRESET, before overrides."""
  file, *preset = path.split(":", 1)
  if not os.path.isfile(file):
    raise InputError(f"--config={path}: no file {file!r} in {os.getcwd()}")
  try:
    config = runpy.run_path(file)["get_config"](*preset)
  except InputError as error:
    raise InputError(f"--config={path}: {error}") from error
  except Exception as error:  # a config file is a program and may raise anything
    reason = " ".join("".join(traceback.format_exception_only(error)).split())
    raise InputError(f"--config={path}: {reason}") from error
  if not isinstance(config, ConfigDict):
    returned = type(config).__name__
    raise InputError(f"--config={path}: get_config returns {returned}, not ConfigDict")
  return config


def _key_types(config: Any, prefix: str = "config") -> dict[str, type]:
  """Returns dotted key -> type of its values."""
  types = {}
  for key in config:
    path, key_type = f"{prefix}.{key}", config.get_type(key)
    is_group = issubclass(key_type, ConfigDict)
    types |= _key_types(config[key], path) if is_group else {path: key_type}
  return types


def _check_overrides(argv: list[str], file: str | None, types: dict[str, type]) -> None:
  """Raises an InputError for a --config.KEY that the config lacks."""
  for name, _ in _flags(argv):
    name = name.removeprefix("no") if name.startswith("noconfig.") else name
    if not name.startswith("config.") or name in types:
      continue
    if file is None:
      raise InputError(f"--{name} changes a config, and --config is missing")
    keys = [key for key in types if key.startswith(f"{name}.")]
    if keys:
      raise InputError(f"{name} is a group of keys; set them one by one, such as --{keys[0]}")
    raise InputError(unknown_key(name, list(types)))
