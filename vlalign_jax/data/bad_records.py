"""Decides how many bad records a run bears, and tells about them."""

from collections.abc import Sequence
from typing import Any

from absl import logging

from vlalign_jax.errors import InputError

MAX_SHARE = 0.01
SHOWN = 10  # the most warnings about single records


def warn(name: str, errors: Sequence[InputError | str]) -> None:
  """Logs records that are left out, at most SHOWN = 10 of them, and their number."""
  for error in errors[:SHOWN]:
    logging.warning("Left out: %s", error)
  if errors:
    noun = "record is" if len(errors) == 1 else "records are"
    logging.warning("%s: %d bad %s left out", name, len(errors), noun)


def check(name: str, bad: int, examples: int, rules: Any) -> None:
  """Refuses data of which too large a share is bad; one bad record alone is fine.

  With several hosts every bad record is counted here, so that all hosts end at the same step.

  Args:
    name: the config key or the file of the data.
    bad: number of examples that were left out.
    examples: number of all examples.
    rules: a config's `data` group, or `records.Options`: with on_bad_record="error" no record may
      be bad, else a share of max_bad_records.

  Raises:
    InputError: too many are bad, or all are.
  """
  if bad and rules.on_bad_record == "error":
    raise InputError(
      f"{name}: a record could not be read; the host that has it names it in its log: fix it, or "
      "set data.on_bad_record=skip"
    )
  if bad and (bad == examples or bad > max(1, rules.max_bad_records * examples)):
    raise InputError(
      f"{name}: {bad} of {examples} records could not be read, more than data.max_bad_records ="
      f" {rules.max_bad_records:g}; scripts/check_data.py lists them with their reasons, and writes"
      " the others with --write_good"
    )
