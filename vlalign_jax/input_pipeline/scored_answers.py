"""The data of prediction from given answers: prompts with one answer or more, none of them lost."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlalign_jax.data import measure
from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.data.encode import Example, check_image_token, check_placed, expand
from vlalign_jax.data.encode_preferences import answer_texts, branch
from vlalign_jax.data.records import Record
from vlalign_jax.data.templates import closing
from vlalign_jax.data.tokens import tokenize_branches
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedAnswers:
  """What became of a record's answers, each named by its place among them.

  Attributes:
    example: None where no answer fits.
    kept: the answers that are its branches, in order.
    apart: answers that fit behind the prompt, but not beside those.
    too_long: answers that do not fit even alone.
  """

  example: Example | None
  kept: tuple[int, ...]
  apart: tuple[int, ...]
  too_long: tuple[int, ...]

  @property
  def counts(self) -> tuple[int, int, int]:
    """Answers kept, apart and too long, as `prepare.Task` has them."""
    return len(self.kept), len(self.apart), len(self.too_long)


@dataclasses.dataclass(frozen=True)
class Unit:
  """Answers to a record that share an example: its prompt is computed once for them.

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
  image_token_id: int,
  tokens_per_image: int,
  max_length: int,
) -> EncodedAnswers:
  """Encodes `record.answers` as `encode_preferences` does; one is enough, equal ones all count.

  Args:
    record, template, tokenizer, image_token_id, tokens_per_image, max_length: as there.

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  check_image_token(tokenizer, image_token_id)
  prompt, answers = answer_texts(record, range(len(record.answers)), template, tokenizer)
  end = closing(template, tokenizer)
  pieces, branches = tokenize_branches(prompt, [(answer, end) for answer in answers], tokenizer)
  images = [turn.human.count(IMAGE_PLACEHOLDER) for turn in record.turns]
  for answer, _ in branches:
    check_placed([*pieces, answer], images, image_token_id, record.where)
  trunk = expand(np.concatenate(pieces), image_token_id, tokens_per_image)
  if not len(trunk):
    raise InputError(f"{record.where}: the prompt has no token; choose another data.template")

  length, kept, apart, too_long = len(trunk) - 1, {}, [], []
  for place, ids in enumerate(map(np.concatenate, branches)):
    if len(trunk) + len(ids) > max_length:
      too_long.append(place)
    elif length + 1 + len(ids) > max_length:
      apart.append(place)
    else:
      kept[place] = ids
      length += 1 + len(ids)
  example = branch(trunk, list(kept.values()), record.images, record.where) if kept else None
  return EncodedAnswers(example, tuple(kept), tuple(apart), tuple(too_long))


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
    row_multiple: rows of a batch are a multiple of this.

  Returns:
    What makes rows with `answers` and `examples`, which are the numbers of units; the units.

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
    units = _fitting(load, units, measured)
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


def _fitting(load: prepare.LoadExample, units: list[Unit], measured: measure.Measured):
  """Units that fit, given one of each record: what does not fit beside other answers is alone."""
  found = []
  for unit, (_, apart, too_long) in zip(units, measured.counts, strict=True):
    if not apart and not too_long:
      found.append(unit)
      continue
    encoded = load.encoded(unit.record)
    groups = [encoded.kept, *((place,) for place in encoded.apart)]
    found += [Unit(unit.record, group) for group in groups if group]
  return found


def _part(record: Record, unit: Unit) -> Record:
  return dataclasses.replace(record, answers=tuple(record.answers[n] for n in unit.answers))
