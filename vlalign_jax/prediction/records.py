"""The records of `data.eval`, what they show in predictions, and what tells them from others."""

import hashlib
import itertools

from absl import logging

from vlalign_jax.data import mixture
from vlalign_jax.data.records import Record
from vlalign_jax.weights import provenance
from vlalign_jax.weights.source import ModelSource

SHOWN = 10  # warnings about single lines


def load_records(config) -> tuple[Record, ...]:
  """The records of `data.eval`, whose last question has one answer, ranked ones, or none.

  Raises:
    InputError: a file or record is bad.
  """
  data = config.data
  found = mixture.load_samples(
    data.eval, data.images, data.eval_samples, config.seed, "eval", "optional"
  )
  return tuple(itertools.chain(*found))


def given_answers(record: Record) -> tuple[str, ...]:
  """The answers to the last question, the best first; none if they are absent."""
  last = record.turns[-1].gpt
  return record.answers if last is None else (last,)


def reference(record: Record) -> str | None:
  """The answer that others are compared with."""
  return next(iter(given_answers(record)), None)


def shown(number: int, record: Record) -> dict:
  """What a line of predictions says of its record."""
  *before, last = record.turns
  line = {"record": number, "id": record.id, "images": list(record.images), "prompt": last.human}
  if before:
    line["history"] = [[turn.human, turn.gpt] for turn in before]
  return line


def warn_left_out(lines: list[dict], records: tuple[Record, ...]) -> None:
  """Says in the log which lines have no answer or nothing about it, and why; at most SHOWN."""
  left_out = [line for line in lines if "reason" in line]
  for line in left_out[:SHOWN]:
    which = f", answer of rank {line['rank']}" if "rank" in line else ""
    logging.warning("%s%s: left out, %s", records[line["record"]].where, which, line["reason"])
  if left_out:
    logging.warning("%d of %d lines are left out, each says why", len(left_out), len(lines))


def inputs(records: tuple[Record, ...], models: dict[str, ModelSource]) -> dict:
  """What predictions depend on besides the config, by the key that names it.

  Args:
    records: of `data.eval`.
    models: config key -> the model that it names.
  """
  digest = hashlib.sha256()
  for record in records:
    digest.update(repr((record.id, record.images, record.turns, record.answers)).encode())
  return {"data.eval": digest.hexdigest()} | {
    key: {
      "weights": provenance.content(opened),
      "tokenizer": hashlib.sha256(opened.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }
    for key, opened in models.items()
  }
