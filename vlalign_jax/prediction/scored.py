"""Answers of records: their log-probabilities under a policy, or their reward model's scores."""

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

TOO_LONG, UNREADABLE = "it does not fit behind its prompt", "its images cannot be read"
# () -> (graphdef, params); called only if there is something to compute.
Load = Callable[[], tuple]


def with_answers(record: Record, answers: Sequence[str]) -> Record:
  """Returns the record with these answers to its last question."""
  *before, last = record.turns
  return replace(record, turns=(*before, replace(last, gpt=None)), answers=tuple(answers))


def score(
  config,
  source: ModelSource,
  load: Load,
  records: Sequence[Record],
  mesh: Mesh,
  done: Collection[tuple[int, int]] = (),
) -> Iterator[tuple[int, int, dict]]:
  """Computes the log-probabilities or scores of answers; answers to one prompt share it.

  Args:
    config: has `batch_size` (records) and the `data` group.
    source: a policy or a reward model.
    load: see Load; loads `source` onto the mesh.
    records: each with at least one of `answers`.
    mesh: the mesh that rows are split over.
    done: (record, answer) that already have values; they count in the plan of batches.

  Yields:
    (number of the record, index of the answer, values). Values are `reward`, or `logprob`,
    `num_tokens` and `token_logprobs`; an answer's end token counts. A value that is not finite is
    null. An answer that cannot be scored has null values and a `reason`.

  Raises:
    InputError: nothing fits, or a record is bad.
  """
  missing = {
    (number, n) for number, record in enumerate(records) for n in range(len(record.answers))
  }
  missing -= {*done}
  if not missing:
    return
  is_reward = source.config.head == SCORE
  prepared, units = prepare_answers(config, source, list(records), meshes.row_blocks(mesh))
  planned = {(unit.record, n) for unit in units for n in unit.answers}
  nulls = dict.fromkeys(["reward"] if is_reward else ["logprob", "num_tokens", "token_logprobs"])
  for key in sorted(missing - planned):
    yield *key, nulls | {"reason": f"{TOO_LONG} in {config.data.max_length} tokens"}
  missing &= planned
  keys = [[(unit.record, n) for n in unit.answers] for unit in units]
  needed = [
    any(key in missing for unit in _units_of(prepared.plan, step) for key in keys[unit])
    for step in range(prepared.plan.steps)
  ]
  if any(needed):
    program = _make_program(load, mesh, is_reward)
    for batch, results in _run(program, prepared, needed, mesh):
      for unit, n, values in _read(batch, results, is_reward):
        if keys[unit][n] in missing:
          missing.remove(keys[unit][n])
          yield *keys[unit][n], values
  for key in sorted(missing):
    yield *key, nulls | {"reason": UNREADABLE}


def _units_of(plan, step: int) -> np.ndarray:
  first, last = step * plan.rows, (step + 1) * plan.rows
  return plan.examples[plan.offsets[first] : plan.offsets[last]]


def _make_program(load: Load, mesh: Mesh, is_reward: bool):
  """Returns batch -> float32[B, S, K] scores, or float32[B, T] log-probabilities of the tokens."""
  graphdef, params = load()

  def compute(params, batch):
    model = nnx.merge(graphdef, params)
    if is_reward:
      return steps.scores(model, batch)
    return steps.token_log_probabilities(model, batch, mesh=mesh, chunk=meshes.head_chunk(mesh))

  program = jax.jit(compute, out_shardings=meshes.batch_sharding(mesh))
  return lambda batch: program(params, batch)


def _run(program, prepared, needed: list[bool], mesh: Mesh):
  """Yields (batch, result) of the needed steps; the next step runs while one is read."""
  first, pending = needed.index(True), None
  with prepared.batches(start_step=first) as batches:
    for step, batch in enumerate(batches, start=first):
      if not needed[step]:
        continue
      batch = {name: batch[name] for name in batch if name != "skipped"}
      running = program(hosts.to_device(mesh, batch))
      del batch["images"]
      if pending is not None:
        yield pending[0], jax.device_get(pending[1])
      pending = batch, running
  yield pending[0], jax.device_get(pending[1])


def _read(batch, results, is_reward: bool) -> Iterator[tuple[int, int, dict]]:
  """Yields (unit, index among its answers, values) of a batch."""
  for b, s, k in np.argwhere(batch["answers"] >= 0):
    unit = int(batch["examples"][b, s])
    if is_reward:
      yield unit, int(k), {"reward": directory.number(results[b, s, k])}
      continue
    branch = (batch["segments"][b] == s + 1) & (batch["branches"][b] == k + 1)
    logps = results[b][branch & (batch["loss_mask"][b] != 0)]
    values = {"logprob": directory.number(logps.sum(dtype=np.float64)), "num_tokens": len(logps)}
    yield unit, int(k), values | {"token_logprobs": [directory.number(value) for value in logps]}


@out_of_memory.names(out_of_memory.SCORING)
def predict_scores(
  config, workdir: str, source: ModelSource, load: Load, records, mesh
) -> list[dict]:
  """Runs the modes `logprobs` and `reward`: writes a line for each answer of the records.

  Args:
    config: of the prediction.
    workdir: its directory.
    source, load, mesh: as in `score`.
    records: all of them.

  Returns:
    The lines in the order of records and ranks.

  Raises:
    InputError: a record has no answer; see also `score`.
  """
  answered = []
  for record in records:
    answers = data.record_answers(record)
    if not answers:
      raise InputError(
        f"{record.where}: it has no answer, and config.mode={config.mode} scores the answers of "
        'records; add one, or use config.mode="generate"'
      )
    answered.append(with_answers(record, answers))
  path = os.path.join(workdir, directory.PREDICTIONS)
  lines = directory.read_lines(path)
  directory.write_lines(path, lines)
  done = {(line["record"], line.get("rank", 0)) for line in lines}
  total = sum(len(record.answers) for record in answered)
  if done:
    logging.info("%s: resumed, %d of %d answers have values", path, len(done), total)
  results = score(config, source, load, answered, mesh, done)
  with directory.append_lines(path) as append:
    for number, index, values in progress.shown(results, config.mode, total, len(done)):
      line = data.shown(number, records[number])
      if records[number].answers:
        line["rank"] = index
      lines.append(line | {"answer": answered[number].answers[index]} | values)
      append(lines[-1])
  lines.sort(key=lambda line: (line["record"], line.get("rank", 0)))
  directory.write_lines(path, lines)
  data.warn_left_out(lines, records)
  return lines
