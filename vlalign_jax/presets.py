"""Finds the config files of an installed package, so that presets work in any directory."""

import importlib.util
import os

_FLAG = "--config="


def find_installed(argv: list[str]) -> list[str]:
  """Returns the command line with `--config=configs/STAGE.py[:PRESET]` naming an existing file.

  A file in the working directory is preferred to the installed one of that name.
  """
  return [_find(argument) for argument in argv]


def _find(argument: str) -> str:
  file, colon, preset = argument.removeprefix(_FLAG).partition(":")
  if not argument.startswith(f"{_FLAG}configs/") or os.path.exists(file):
    return argument
  stage = os.path.splitext(os.path.basename(file))[0]
  try:
    module = importlib.util.find_spec(f"vlalign_jax.configs.{stage}")
  except ModuleNotFoundError:  # run from a checkout that is not installed
    return argument
  return argument if module is None else f"{_FLAG}{module.origin}{colon}{preset}"
