"""Mode `generate`: samples of answers to records, as lines."""

import collections
import os

from absl import logging

from vlalign_jax import out_of_memory, progress
from vlalign_jax.data.records import Record
from vlalign_jax.generation.answers import Answer, generate_answers
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.prediction import directory
from vlalign_jax.prediction import records as data
from vlalign_jax.weights.source import ModelSource


def finished(lines: list[dict], samples: int) -> list[dict]:
  """The lines of records that have all their samples, or one that says why they have none."""
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
  """Answers all records that have no lines yet, writing each answer as it comes.

  Args:
    config: of the prediction.
    workdir: its directory.
    source: the policy.
    load: `() -> (graphdef, params)` of it over the mesh; called if anything is to be generated.
    records: all of them.
    sampling: what is asked for.
    mesh: over which prompts are split.

  Returns:
    The lines of all answers in the order of records and samples, and one with the answer null and
    a "reason" for each record that cannot be answered.

  Raises:
    InputError: see `generate_answers`.
  """
  path = os.path.join(workdir, directory.PREDICTIONS)
  lines = finished(directory.read_lines(path), sampling.num_return_sequences)
  directory.write_lines(path, lines)
  done = {line["record"] for line in lines}
  if done:
    logging.info("%s: going on, %d of %d records have answers", path, len(done), len(records))
  missing = set(range(len(records))) - done
  if missing:
    options = {"gather": config.generation.gather, "done": done}
    answers = generate_answers(config, source, load()[1], records, sampling, mesh, **options)
    total = len(missing) * sampling.num_return_sequences
    with directory.appended(path) as add:
      for answer in progress.shown(answers, "generate", total):
        lines.append(_line(answer, records[answer.record]))
        add(lines[-1])
  for number in sorted(missing - {line["record"] for line in lines}):
    lines.append(_unanswered(number, records[number], _reason(config, source, records[number])))
  lines.sort(key=lambda line: (line["record"], line.get("sample", 0)))
  directory.write_lines(path, lines)
  data.warn_left_out(lines, records)
  return lines


def _reason(config, source: ModelSource, record: Record) -> str:
  """Why a record was not answered."""
  length = config.data.max_length
  found = prompts.encode_prompt(
    record,
    config.data.template,
    source.tokenizer,
    source.config.image_token_id,
    source.config.tokens_per_image,
    length,
  )
  if found.example is None:
    return f"its prompt does not fit config.data.max_length={length}"
  return "its pictures cannot be read"


def _line(answer: Answer, record: Record) -> dict:
  return data.shown(answer.record, record) | {
    "sample": answer.sample,
    "answer": answer.text,
    "reference": data.reference(record),
    "logprob": directory.number(answer.log_probability),
    "num_tokens": len(answer.tokens),
    "ended": answer.ended,
  }


def _unanswered(place: int, record: Record, reason: str) -> dict:
  empty = {"answer": None, "reference": data.reference(record), "logprob": None, "num_tokens": 0}
  return data.shown(place, record) | empty | {"ended": False, "reason": reason}
