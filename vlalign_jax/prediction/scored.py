"""Given answers: their log-probabilities under a policy, or their scores by a reward model."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import out_of_memory, progress
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline.scored_answers import prepare_answers
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.prediction import directory
from vlalign_jax.prediction import records as data
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import answers as steps
from vlalign_jax.weights.source import ModelSource

TOO_LONG, UNREADABLE = "it does not fit behind its prompt", "its pictures cannot be read"
# () -> (graphdef, params), called if there is anything to compute.
Load = Callable[[], tuple]


def with_answers(record: Record, answers: Sequence[str]) -> Record:
  """The record with these answers to its last question."""
  *before, last = record.turns
  return replace(record, turns=(*before, replace(last, gpt=None)), answers=tuple(answers))


def evaluate(
  config,
  source: ModelSource,
  load: Load,
  records: Sequence[Record],
  mesh: Mesh,
  done: Collection[tuple[int, int]] = (),
) -> Iterator[tuple[int, int, dict]]:
  """Computes what a model says of answers; several to one prompt share it.

  Args:
    config: has `batch_size` (records) and the `data` group.
    source: a policy or a reward model.
    load: see Load; of `source`, over the mesh.
    records: each with one or more in `answers`.
    mesh: over which rows are split.
    done: (record, answer) of what is known already; batches are as they would be with these.

  Yields:
    (number of the record, place of the answer in it, found): found has `reward`, or `logprob`,
    `num_tokens` and `token_logprobs`; each is null where it is not finite. Of an answer that cannot
    be evaluated it has these as null, and the `reason`. An answer's end token counts.

  Raises:
    InputError: nothing fits, or a record is bad.
  """
  missing = {
    (number, n) for number, record in enumerate(records) for n in range(len(record.answers))
  }
  missing -= {*done}
  if not missing:
    return
  scores = source.config.head == SCORE
  prepared, units = prepare_answers(config, source, list(records), meshes.row_blocks(mesh))
  planned = {(unit.record, n) for unit in units for n in unit.answers}
  unknown = dict.fromkeys(["reward"] if scores else ["logprob", "num_tokens", "token_logprobs"])
  for number, n in sorted(missing - planned):
    reason = f"{TOO_LONG} in {config.data.max_length} tokens"
    yield number, n, unknown | {"reason": reason}
  missing &= planned
  keys = [[(unit.record, n) for n in unit.answers] for unit in units]
  needed = [
    any(key in missing for unit in _units_of(prepared.plan, step) for key in keys[unit])
    for step in range(prepared.plan.steps)
  ]
  if any(needed):
    program = _make_program(load, mesh, scores)
    for rows, values in _run(program, prepared, needed, mesh):
      for unit, n, found in _read(rows, values, scores):
        if keys[unit][n] in missing:
          missing.remove(keys[unit][n])
          yield *keys[unit][n], found
  for number, n in sorted(missing):
    yield number, n, unknown | {"reason": UNREADABLE}


def _units_of(plan, step: int) -> np.ndarray:
  first, last = step * plan.rows, (step + 1) * plan.rows
  return plan.examples[plan.offsets[first] : plan.offsets[last]]


def _make_program(load: Load, mesh: Mesh, scores: bool):
  """rows -> float32[B, S, K] scores, or float32[B, T] log-probabilities of the tokens."""
  graphdef, params = load()

  def of_rows(params, rows):
    model = nnx.merge(graphdef, params)
    if scores:
      return steps.scores(model, rows)
    return steps.token_log_probabilities(model, rows, mesh=mesh, chunk=meshes.head_chunk(mesh))

  program = jax.jit(of_rows, out_shardings=meshes.batch_sharding(mesh))
  return lambda rows: program(params, rows)


def _run(program, prepared, needed: list[bool], mesh: Mesh):
  """(host rows, host results) of the needed steps; the next step runs while one is read."""
  first, pending = needed.index(True), None
  with prepared.batches(start_step=first) as batches:
    for step, rows in enumerate(batches, start=first):
      if not needed[step]:
        continue
      rows = {name: rows[name] for name in rows if name != "skipped"}
      running = program(hosts.to_device(mesh, rows))
      del rows["images"]
      if pending is not None:
        yield pending[0], jax.device_get(pending[1])
      pending = rows, running
  yield pending[0], jax.device_get(pending[1])


def _read(rows, values, scores: bool) -> Iterator[tuple[int, int, dict]]:
  """(unit, place among its answers, what was found) of a batch."""
  for b, s, k in np.argwhere(rows["answers"] >= 0):
    unit = int(rows["examples"][b, s])
    if scores:
      yield unit, int(k), {"reward": directory.number(values[b, s, k])}
      continue
    branch = (rows["segments"][b] == s + 1) & (rows["branches"][b] == k + 1)
    found = values[b][branch & (rows["loss_mask"][b] != 0)]
    total = found.sum(dtype=np.float64)
    yield (
      unit,
      int(k),
      {
        "logprob": directory.number(total),
        "num_tokens": len(found),
        "token_logprobs": [directory.number(value) for value in found],
      },
    )


@out_of_memory.names(out_of_memory.SCORING)
def predict_given(
  config, workdir: str, source: ModelSource, load: Load, records, mesh
) -> list[dict]:
  """Modes `logprobs` and `reward`: a line for every answer that the records have.

  Args:
    config: of the prediction.
    workdir: its directory.
    source, load, mesh: as of `evaluate`.
    records: all of them.

  Returns:
    The lines in the order of records and ranks.

  Raises:
    InputError: a record has no answer, or see `evaluate`.
  """
  for record in records:
    if not data.given_answers(record):
      raise InputError(
        f"{record.where}: no answer is given, and config.mode={config.mode} is about given "
        'answers; add it, or use config.mode="generate"'
      )
  path = os.path.join(workdir, directory.PREDICTIONS)
  lines = directory.read_lines(path)
  directory.write_lines(path, lines)
  done = {(line["record"], line.get("rank", 0)) for line in lines}
  total = sum(len(data.given_answers(record)) for record in records)
  if done:
    logging.info("%s: %d of %d answers are there", path, len(done), total)
  asked = [with_answers(record, data.given_answers(record)) for record in records]
  found = evaluate(config, source, load, asked, mesh, done)
  with directory.appended(path) as add:
    for number, place, values in progress.shown(found, config.mode, total, len(done)):
      line = data.shown(number, records[number])
      if records[number].answers:
        line["rank"] = place
      lines.append(line | {"answer": asked[number].answers[place]} | values)
      add(lines[-1])
  lines.sort(key=lambda line: (line["record"], line.get("rank", 0)))
  directory.write_lines(path, lines)
  data.warn_left_out(lines, records)
  return lines
