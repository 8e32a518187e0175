"""Mode `generate`: sampled answers to records, as lines."""

import collections
import os

from absl import logging

from vlalign_jax import out_of_memory, progress
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError
from vlalign_jax.generation.answers import Answer, generate_answers
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.prediction import directory
from vlalign_jax.prediction import records as data
from vlalign_jax.weights.source import ModelSource

UNREADABLE = "its images cannot be read"


def finished(lines: list[dict], samples: int) -> list[dict]:
  """Returns the lines of records that have all their samples, or a line with the reason why not."""
  counts = collections.Counter(line["record"] for line in lines)
  return [line for line in lines if "reason" in line or counts[line["record"]] == samples]


@out_of_memory.names(out_of_memory.SAMPLING)
def generate(
  config,
  workdir: str,
  source: ModelSource,
  load,
  records: tuple[Record, ...],
  sampling: Sampling,
  mesh,
) -> list[dict]:
  """Answers all records that have no lines yet, and writes each answer at once.

  Args:
    config: of the prediction.
    workdir: its directory.
    source: the policy.
    load: () -> (graphdef, params) on the mesh; called only if there is something to generate.
    records: all of them.
    sampling: how tokens are chosen.
    mesh: the mesh that prompts are split over.

  Returns:
    The lines of all answers in the order of records and samples; for a record that cannot be
    answered, one line whose answer is null, with a "reason".

  Raises:
    InputError: see `generate_answers`.
  """
  path = os.path.join(workdir, directory.PREDICTIONS)
  lines = finished(directory.read_lines(path), sampling.num_return_sequences)
  directory.write_lines(path, lines)
  done = {line["record"] for line in lines}
  if done:
    logging.info("%s: resumed, %d of %d records have answers", path, len(done), len(records))
  missing = set(range(len(records))) - done
  if missing:
    answers = generate_answers(config, source, load()[1], records, sampling, mesh, done=done)
    total = len(missing) * sampling.num_return_sequences
    with directory.append_lines(path) as append:
      for answer in progress.shown(answers, "generate", total):
        lines.append(_line(answer, records[answer.record]))
        append(lines[-1])
  for number in sorted(missing - {line["record"] for line in lines}):
    lines.append(_unanswered(number, records[number], _reason(config, source, records[number])))
  lines.sort(key=lambda line: (line["record"], line.get("sample", 0)))
  directory.write_lines(path, lines)
  data.warn_left_out(lines, records)
  return lines


def _reason(config, source: ModelSource, record: Record) -> str:
  """Returns why a record was not answered."""
  length, template = config.data.max_length, config.data.template
  try:
    encoded = prompts.encode_prompt(record, template, source.tokenizer, source.layout, length)
  except InputError:  # the tokens of its images depend on their sizes
    return UNREADABLE
  if encoded.example is None:
    return f"its prompt does not fit config.data.max_length={length}"
  return UNREADABLE


def _line(answer: Answer, record: Record) -> dict:
  return data.shown(answer.record, record) | {
    "sample": answer.sample,
    "answer": answer.text,
    "reference": data.reference(record),
    "logprob": directory.number(answer.log_probability),
    "num_tokens": len(answer.tokens),
    "ended": answer.ended,
  }


def _unanswered(number: int, record: Record, reason: str) -> dict:
  empty = {"answer": None, "reference": data.reference(record), "logprob": None, "num_tokens": 0}
  return data.shown(number, record) | empty | {"ended": False, "reason": reason}
