"""Answers to records as text."""

import dataclasses
import zlib
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlalign_jax.data.records import Record
from vlalign_jax.generation.decoder import Generated
from vlalign_jax.generation.generate import log_memory, make_generate
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
    text: stripped, without special tokens.
    tokens: int32[M] ids, including the stop token.
    log_probability: natural logarithm of the probability of all tokens under the model itself.
    ended: whether it has a stop token; otherwise it was cut at max_new_tokens.
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
  records: Sequence[Record],
  sampling: Sampling,
  mesh: Mesh,
  *,
  done: Collection[int] = (),
) -> Iterator[Answer]:
  """Answers records, batch by batch; a batch has prompts of similar lengths.

  The next batch runs while the answers of the last are read. The answers to a record depend on the
  record, `config.seed` and the parameters, not on the other records.

  Args:
    config: has `batch_size` (prompts), `seed`, `model.dtype` and the `data` group.
    source: the model.
    params: nested dict of all parameters on the mesh.
    records: their last answers are not read.
    sampling: how tokens are chosen; without stop tokens, those of model and template end an answer.
    mesh: the mesh that prompts are split over.
    done: numbers of records that already have answers. They count in the plan of batches, so that
      a resumed run gives the same answers as an uninterrupted one.

  Yields:
    All answers to a record one after the other. Records whose prompt is longer than
    `data.max_length` get none, nor do unreadable ones if `data.on_bad_record` is "skip".

  Raises:
    InputError: no prompt fits, a record is bad, or the sampling makes no sense.
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
    pad_id=source.tokenizer.pad_token_id,
  )
  share, plan, pending = hosts.row_share(mesh), prepared.plan, None
  streams = np.array([_stream(record) for record in records], np.int32)
  done = np.array([-1, *done])
  wanted = []  # step -> int[B] numbers of the records, -1 for rows that need no answers
  for step in range(plan.steps):
    numbers = prompts.record_numbers(plan, step, tuple(range(share.count)), share.count)
    wanted.append(np.where(np.isin(numbers, done), -1, numbers))
  needed = [step for step, numbers in enumerate(wanted) if numbers.max() >= 0]
  if not needed:
    return
  # Checks the largest batch first, so that a run does not fail at its end for lack of memory.
  sizes = [(int(plan.row_counts[step]), int(plan.lengths[step])) for step in needed]
  num_rows, length = max(sizes, key=lambda size: size[0] * (size[1] + sampling.max_new_tokens))
  log_memory(source.config, sampling, num_rows, length, config.model.dtype, mesh)
  options = {"start_step": needed[0], "blocks": share.blocks, "block_count": share.count}
  with prepared.batches(workers=0, **options) as batches:
    for step, batch in enumerate(batches, start=needed[0]):
      if wanted[step].max() < 0:
        continue
      numbers = prompts.record_numbers(plan, step, share.blocks, share.count)
      batch["prompts"] = np.where(numbers < 0, 0, streams[numbers])
      if not plan.row_images[step * plan.rows : (step + 1) * plan.rows].any():
        batch["images"] = batch["images"][:, :0]
      del batch["skipped"]
      batch = hosts.to_device(mesh, batch)
      prompt_streams = batch.pop("prompts")
      running = program(params, batch, prompt_streams, config.seed)
      if pending is not None:
        yield from _read(source, *pending)
      pending = wanted[step], running
  if pending is not None:
    yield from _read(source, *pending)


def _stream(record: Record) -> int:
  """Returns a number of the record that does not depend on the list that it is in."""
  prompt = [(turn.human, turn.gpt) for turn in record.turns[:-1]], record.turns[-1].human
  if record.system:
    prompt = record.system, *prompt
  images, *_ = record.content
  return zlib.crc32(f"{record.index} {record.id} {images} {prompt}".encode()) & 0x7FFFFFFF


def _read(source: ModelSource, numbers: np.ndarray, generated: Generated) -> Iterator[Answer]:
  if jax.process_count() > 1:
    generated = multihost_utils.process_allgather(generated, tiled=True)
  generated = jax.device_get(generated)
  for row, record in enumerate(numbers):
    for sample, length in enumerate(generated.lengths[row]):
      if record < 0 or not length:  # no answer is wanted, or the row is padding
        continue
      tokens = generated.tokens[row, sample, :length]
      yield Answer(
        record=int(record),
        sample=sample,
        text=source.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        tokens=np.asarray(tokens),
        log_probability=float(generated.log_probabilities[row, sample, :length].sum(dtype=float)),
        ended=bool(generated.ended[row, sample]),
      )
