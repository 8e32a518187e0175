"""Scores by a Python function: rules, checkers, anything that takes text."""

import importlib
import os
import sys
from collections.abc import Callable

from vlalign_jax.errors import InputError, shorten

KEY = "config.ppo.reward_function"


def find(name: str) -> Callable:
  """Imports the function `module:name`; the working directory is searched, too.

  Raises:
    InputError: there is no such function.
  """
  module, _, attribute = name.partition(":")
  if not module or not attribute:
    raise InputError(f"{KEY} is {name!r}; give module:name, such as rewards:exact_match")
  here = os.getcwd()
  if here not in sys.path:
    sys.path.append(here)
  try:
    found = getattr(importlib.import_module(module), attribute)
  except Exception as error:  # the user's module may raise anything
    raise InputError(f"{KEY}={name}: {type(error).__name__}: {error}") from error
  if not callable(found):
    raise InputError(f"{KEY}={name} is {found!r}, which cannot be called")
  return found


def score(function: Callable, name: str, record, answer: str) -> float:
  """Calls the function for an answer; returns nan and infinities as they are.

  It is called with the keywords `prompt` (the last question), `answer`, `reference` (the record's
  own answer, the best of ranked ones, or None) and `record`: a dict of all columns that the
  record has in its file (paths in place of pictures that it holds), and of id, images, turns,
  answers and system, as this code reads them.

  Args:
    function: from `find`.
    name: `module:name`, for errors.
    record: a data.records.Record.
    answer: without special tokens.

  Raises:
    InputError: it raises, or returns something that is not a number.
  """
  last = record.turns[-1]
  reference = record.answers[0] if last.gpt is None and record.answers else last.gpt
  content = (record.columns or {}) | {
    "id": record.id,
    "images": list(record.images),
    "turns": [(turn.human, turn.gpt) for turn in record.turns],
    "answers": list(record.answers),
    "system": record.system,
  }
  try:
    return float(function(prompt=last.human, answer=answer, reference=reference, record=content))
  except Exception as error:
    raise InputError(
      f"{KEY}={name} failed on {record.where}, answer {shorten(answer)!r}:"
      f" {type(error).__name__}: {shorten(str(error), 150)}"
    ) from error
