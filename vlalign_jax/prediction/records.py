"""The records of `data.eval`, their fields in predictions, and digests that identify them."""

import hashlib
import itertools
import os

from absl import logging

from vlalign_jax.data import mixture
from vlalign_jax.data.records import Record
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.weights import provenance
from vlalign_jax.weights.source import ModelSource

SHOWN = 10  # the most warnings about single lines


def load_records(config) -> tuple[Record, ...]:
  """Loads the records of `data.eval`, whose last question has one answer, ranked ones, or none.

  Raises:
    InputError: a file or record is bad.
  """
  data, options = config.data, prepare.record_options(config.data, "optional")
  samples = mixture.load_samples(data.eval, data.eval_samples, config.seed, "eval", options)
  return tuple(itertools.chain(*samples))


def record_answers(record: Record) -> tuple[str, ...]:
  """Returns the record's answers to the last question, the best first; () if it has none."""
  last = record.turns[-1].gpt
  return record.answers if last is None else (last,)


def reference(record: Record) -> str | None:
  """Returns the answer that others are compared with; None if there is none."""
  return next(iter(record_answers(record)), None)


def shown(number: int, record: Record) -> dict:
  """Returns the fields of a line that describe its record."""
  *before, last = record.turns
  line = {"record": number, "id": record.id, "images": list(record.images), "prompt": last.human}
  if record.images:
    line["image_root"] = os.path.abspath(record.root)
  if record.system:
    line["system"] = record.system
  if before:
    line["history"] = [[turn.human, turn.gpt] for turn in before]
  return line


def warn_left_out(lines: list[dict], records: tuple[Record, ...]) -> None:
  """Logs which lines have no answer, or no score, and why; at most SHOWN of them."""
  left_out = [line for line in lines if "reason" in line]
  for line in left_out[:SHOWN]:
    answer = f", answer of rank {line['rank']}" if "rank" in line else ""
    logging.warning("%s%s: left out, %s", records[line["record"]].where, answer, line["reason"])
  if left_out:
    logging.warning("%d of %d lines are left out; each has a reason", len(left_out), len(lines))


def inputs(records: tuple[Record, ...], models: dict[str, ModelSource]) -> dict:
  """Returns config key -> digest of the content that predictions depend on.

  Args:
    records: of `data.eval`.
    models: config key -> the model that it names.
  """
  digest = hashlib.sha256()
  for record in records:
    digest.update(repr((record.id, *record.content)).encode())
  return {"data.eval": digest.hexdigest()} | {
    key: {
      "weights": provenance.content(opened),
      "tokenizer": hashlib.sha256(opened.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }
    for key, opened in models.items()
  }
