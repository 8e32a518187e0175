"""Answers to records as text: from a model's parameters and a list of records to strings."""

import dataclasses
import zlib
from collections.abc import Collection, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlalign_jax.data.records import Record
from vlalign_jax.generation.generate import Generated, log_memory, make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
  """An answer to a record.

  Attributes:
    record: the record's number in the list, from 0.
    sample: the answer's number, from 0.
    text: without special tokens, stripped.
    tokens: int32[M] ids, its stop token included.
    log_probability: of all these tokens under the model itself, natural logarithm.
    ended: whether it ended by itself; otherwise it was cut at max_new_tokens.
  """

  record: int
  sample: int
  text: str
  tokens: np.ndarray
  log_probability: float
  ended: bool


def generate_answers(
  config,
  source: ModelSource,
  params,
  records: list[Record],
  sampling: Sampling,
  mesh: Mesh,
  *,
  gather: bool = False,
  done: Collection[int] = (),
) -> Iterator[Answer]:
  """Answers records, a batch of prompts of like lengths after the other.

  The next batch runs while the last one's answers are read. The answers to a record depend on the
  record, `config.seed` and the parameters, not on the other records.

  Args:
    config: has `batch_size` (prompts), `seed`, `model.dtype` and the `data` group.
    source: the model.
    params: nested dict of all its parameters over the mesh.
    records: their last answers are not read.
    sampling: what is asked for; without stop tokens, those of model and template end an answer.
    mesh: over which prompts are split.
    gather: see `generate.generate`.
    done: numbers of records that need no answers any more. The others are batched as they would be
      with these, so that a run that goes on gives the very answers of one that was not broken off.

  Yields:
    All answers to a record after each other. Records whose prompt is longer than `data.max_length`
    get none, nor do those that cannot be read if `data.on_bad_record` is "skip".

  Raises:
    InputError: no prompt fits, a record is bad, or what is asked for makes no sense.
  """
  if not sampling.stop_tokens:
    stop_tokens = prompts.stop_tokens(source, config.data.template)
    sampling = dataclasses.replace(sampling, stop_tokens=stop_tokens)
  prepared = prompts.prepare_prompts(config, source, records, meshes.row_blocks(mesh))
  program = make_generate(
    source.config,
    sampling,
    mesh=mesh,
    dtype=config.model.dtype,
    attention=config.model.attention,
    gather=gather,
    pad_id=source.tokenizer.pad_token_id,
  )
  share = hosts.row_share(mesh)
  streams = np.array([_stream(record) for record in records], np.int32)
  plan, pending = prepared.plan, None
  everyone = [
    prompts.record_numbers(plan, step, tuple(range(share.count)), share.count)
    for step in range(plan.steps)
  ]
  done = np.array([-1, *done])
  wanted = [np.where(np.isin(numbers, done), -1, numbers) for numbers in everyone]
  needed = [step for step, numbers in enumerate(wanted) if numbers.max() >= 0]
  if not needed:
    return
  # The largest batch, before the first: that it does not fit shall not be found out at the end.
  sizes = [(int(plan.row_counts[step]), int(plan.lengths[step])) for step in needed]
  rows, length = max(sizes, key=lambda size: size[0] * (size[1] + sampling.max_new_tokens))
  log_memory(source.config, sampling, rows, length, config.model.dtype, mesh)
  options = {"start_step": needed[0], "blocks": share.blocks, "block_count": share.count}
  with prepared.batches(workers=0, **options) as batches:
    for step, rows in enumerate(batches, start=needed[0]):
      if wanted[step].max() < 0:
        continue
      numbers = prompts.record_numbers(plan, step, share.blocks, share.count)
      rows["prompts"] = np.where(numbers < 0, 0, streams[numbers])
      if not plan.row_images[step * plan.rows : (step + 1) * plan.rows].any():
        rows["images"] = rows["images"][:, :0]
      del rows["skipped"]
      rows = hosts.to_device(mesh, rows)
      streams_of_rows = rows.pop("prompts")
      running = program(params, rows, streams_of_rows, config.seed)
      if pending is not None:
        yield from _read(source, *pending)
      pending = wanted[step], running
  yield from _read(source, *pending)


def _stream(record: Record) -> int:
  """A number of the record that does not change with the list that it is in."""
  asked = [(turn.human, turn.gpt) for turn in record.turns[:-1]], record.turns[-1].human
  return zlib.crc32(f"{record.index} {record.id} {record.images} {asked}".encode()) & 0x7FFFFFFF


def _read(source: ModelSource, numbers: np.ndarray, generated: Generated) -> Iterator[Answer]:
  if jax.process_count() > 1:
    generated = multihost_utils.process_allgather(generated, tiled=True)
  generated = jax.device_get(generated)
  for row, record in enumerate(numbers):
    for sample, length in enumerate(generated.lengths[row]):
      if record < 0 or not length:  # nothing is wanted, or the row pads
        continue
      tokens = generated.tokens[row, sample, :length]
      yield Answer(
        record=int(record),
        sample=sample,
        text=source.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        tokens=tokens,
        log_probability=float(generated.log_probabilities[row, sample, :length].sum(dtype=float)),
        ended=bool(generated.ended[row, sample]),
      )
