"""The data of predictions for existing answers: prompts with one or more answers."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlalign_jax.data import measure
from vlalign_jax.data.encode import Encoded, branch, fit_answers, tokenize_prompt
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True)
class Unit:
  """Answers to a record that share an example, so that its prompt is computed once for them.

  Attributes:
    record: its number.
    answers: their places among the record's answers.
  """

  record: int
  answers: tuple[int, ...]


def encode_answers(
  record: Record,
  template: str,
  tokenizer,
  layout: PictureLayout,
  max_length: int,
) -> Encoded:
  """Encodes `record.answers` as branches; one is enough, and equal or empty ones are kept.

  Args:
    record, template, tokenizer, layout, max_length: as for
      `encode_preferences`.

  Returns:
    `counts` is the number of answers (kept, apart, too long even alone).

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  options = template, tokenizer, layout
  prompt, answers, pictures = tokenize_prompt(record, record.answers, *options)
  kept = fit_answers(prompt, dict(enumerate(answers)), max_length)
  fit = [n for n, ids in enumerate(answers) if len(prompt) + len(ids) <= max_length]
  apart = tuple(n for n in fit if n not in kept)
  example = None
  if kept:
    chosen = [answers[n] for n in kept]
    example = branch(prompt, chosen, record.images, record.where, pictures=pictures)
  return Encoded(example, (len(kept), len(apart), len(answers) - len(fit)), kept, apart)


def _describe(measured: measure.Measured, max_length: int) -> str:
  kept, _, too_long = measured.counts.sum(axis=0)
  return f"{kept} answers; {too_long} that do not fit data.max_length={max_length}"


TASK = prepare.Task("ranked", encode_answers, _describe, "an answer that fits")


def prepare_answers(
  config, source: ModelSource, records: list[Record], row_multiple: int
) -> tuple[prepare.Prepared, list[Unit]]:
  """Plans one pass over the answers of records.

  Args:
    config: has `batch_size` (units) and the `data` group.
    source: the model.
    records: each with one or more in `answers`.
    row_multiple: the number of rows of a batch is a multiple of this.

  Returns:
    (planned data, whose batches have `answers` and, as `examples`, the numbers of units; units).

  Raises:
    InputError: no answer fits.
  """
  units = [Unit(number, tuple(range(len(record.answers)))) for number, record in enumerate(records)]
  load, measured = prepare.measure_records(TASK, config, source, records, "answers")
  if not measured.lengths.any():
    raise InputError(
      f"no answer of {len(records)} records fits behind its prompt in "
      f"data.max_length={config.data.max_length}; raise it"
    )
  if measured.counts[:, 1:].any():
    units = _split_units(load, units, measured)
    parts = [_part(records[unit.record], unit) for unit in units]
    load, measured = prepare.measure_records(TASK, config, source, parts, "answers, some apart")
  prepared = prepare.lay_out(
    config,
    source,
    load,
    measured,
    np.arange(len(units)),
    row_multiple,
    "answers",
    max_length=int(measured.lengths.max()),
  )
  return prepared, units


def _split_units(load: prepare.LoadExample, units: list[Unit], measured: measure.Measured):
  """Splits units of one record each: an answer that does not fit with others gets its own unit."""
  split = []
  for unit, (_, apart, too_long) in zip(units, measured.counts, strict=True):
    if not apart and not too_long:
      split.append(unit)
      continue
    encoded = load.encoded(unit.record)
    groups = [encoded.kept, *((place,) for place in encoded.apart)]
    split += [Unit(unit.record, group) for group in groups if group]
  return split


def _part(record: Record, unit: Unit) -> Record:
  return dataclasses.replace(record, answers=tuple(record.answers[n] for n in unit.answers))
