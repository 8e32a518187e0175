"""Checks of single values of a config, whatever the stage."""

from collections.abc import Mapping
from typing import Any

from vlalign_jax.errors import InputError

Config = Any  # a ConfigDict: what its keys hold is checked when a run begins, not by types


def check_choices(config: Config, choices: dict[str, tuple]) -> None:
  """Refuses a key whose value is not among its choices; choices: dotted key -> values."""
  for key, allowed in choices.items():
    if value(config, key) not in allowed:
      shown = ", ".join(map(str, allowed))
      raise InputError(f"config.{key} is {value(config, key)!r}; choose from {shown}")


def check_at_least(config: Config, at_least: Mapping[str, float]) -> None:
  """Refuses a key whose value is too low; at_least: dotted key -> the lowest it may have."""
  for key, least in at_least.items():
    given = value(config, key)
    if given is not None and given < least:
      raise InputError(f"config.{key} is {given}; it must be at least {least}")


def check_seed(config: Config) -> None:
  """Refuses a seed that not all random generators take."""
  if not 0 <= config.seed < 2**31:
    raise InputError(f"config.seed is {config.seed}; give 0 or more, and less than 2^31")


def value(config: Config, key: str):
  """Returns the value of a dotted key."""
  for part in key.split("."):
    config = config[part]
  return config
