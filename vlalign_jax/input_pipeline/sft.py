"""The data of supervised fine-tuning: conversations with one answer to every question."""

import functools

import numpy as np

from vlalign_jax.data import encode, measure
from vlalign_jax.input_pipeline import prepare


def _describe(measured: measure.Measured, max_length: int) -> str:
  dropped, usable = measured.counts[:, 0], measured.lengths > 0
  return (
    f"{len(usable)} records; {np.sum(~usable)} skipped, their first answer does not fit"
    f" data.max_length={max_length}; {dropped[usable].sum()} turns dropped from the ends of"
    f" {np.sum((dropped > 0) & usable)} others"
  )


TASK = prepare.Task("one", encode.encode, _describe, "an answer that fits")

load_records = functools.partial(prepare.load_records, TASK)
prepare_train = functools.partial(prepare.prepare_train, TASK)
prepare_eval = functools.partial(prepare.prepare_eval, TASK)
