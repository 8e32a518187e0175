"""The data of reward models and DPO: prompts with ranked answers, the best first."""

import functools

import numpy as np

from vlalign_jax.data import encode_preferences, measure
from vlalign_jax.input_pipeline import prepare


def _describe(measured: measure.Measured, max_length: int) -> str:
  kept, equal, empty, too_long = measured.counts.T
  usable = measured.lengths > 0
  most = kept[usable].max(initial=0)
  return (
    f"{len(usable)} records; {np.sum(~usable)} skipped, fewer than two of their answers are left;"
    f" {kept[usable].sum()} answers of the others, at most {most} of one; left out:"
    f" {equal.sum()} answers equal to a better one, {empty.sum()} empty, {too_long.sum()} that do"
    f" not fit data.max_length={max_length}"
  )


TASK = prepare.Task(
  "ranked", encode_preferences.encode_preferences, _describe, "two different answers that fit"
)

load_records = functools.partial(prepare.load_records, TASK)
prepare_train = functools.partial(prepare.prepare_train, TASK)
prepare_eval = functools.partial(prepare.prepare_eval, TASK)
