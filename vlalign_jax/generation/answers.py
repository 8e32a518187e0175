"""Answers to records as text."""

import contextlib
import dataclasses
import itertools
import zlib
from collections.abc import Collection, Generator, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from vlalign_jax.data.records import Record
from vlalign_jax.generation import memory, refill
from vlalign_jax.generation.decoder import Generated
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.generation.slots import make_slots
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.input_pipeline.prepare import Prepared
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
  """Answers records, `batch_size` at a time: when a record has all its answers, the next begins.

  Records come by the lengths of their prompts, in at most four row lengths; those of one length end
  before the next ones begin, so that the cache has the length they need. The answers to a record
  depend on the record, `config.seed` and the parameters, not on the other records.

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
    All answers to a record one after the other, as soon as they have ended. Records whose prompt is
    longer than `data.max_length` get none, nor do unreadable ones if `data.on_bad_record` is
    "skip".

  Raises:
    InputError: no prompt fits, a record is bad, or the sampling makes no sense.
  """
  if not sampling.stop_tokens:
    stop_tokens = prompts.stop_tokens(source, config.data.template)
    sampling = dataclasses.replace(sampling, stop_tokens=stop_tokens)
  prepared = prompts.prepare_prompts(config, source, records, meshes.row_blocks(mesh))
  programs = make_slots(
    source.config,
    sampling,
    mesh=mesh,
    dtype=config.model.dtype,
    attention=config.model.attention,
    pad_id=source.tokenizer.pad_token_id,
  )
  plan, count = prepared.plan, hosts.row_share(mesh).count
  done = {-1, *done}
  wanted = []  # step -> row -> number of its record, of rows that need answers
  for step in range(plan.steps):
    numbers = prompts.record_numbers(plan, step, tuple(range(count)), count)
    wanted.append({row: n for row, n in enumerate(numbers.tolist()) if n not in done})
  needed = [step for step, rows in enumerate(wanted) if rows]
  if not needed:
    return
  # Checks the longest prompts first, so that a run does not fail at its end for lack of memory.
  slots, longest = int(plan.row_counts.max()), int(plan.lengths[needed].max())
  memory.check(source.config, sampling, ((slots, longest),), config.model.dtype, mesh)
  batches = _batches(prepared, mesh, [_stream(record) for record in records], wanted, needed[0])
  with contextlib.closing(batches):
    for length, group in itertools.groupby(batches, lambda batch: batch.prompts["tokens"].shape[1]):
      lengths = (length,) * (slots // programs.blocks)
      found = refill.answer(programs, params, group, lengths, config.seed)
      for record, generated in found:
        yield from _read(source, record, generated)


def _batches(
  prepared: Prepared, mesh: Mesh, streams: list[int], wanted: list[dict[int, int]], start: int
) -> Generator[refill.Batch]:
  """Puts the prompts of all steps on devices, from `start` on, but for those without wanted rows.

  Args:
    prepared: the prompts.
    mesh: the mesh that rows are split over.
    streams: record -> number that chooses its random numbers.
    wanted: step -> rows that need answers, and the numbers of their records.
    start: the first step.
  """
  share, plan = hosts.row_share(mesh), prepared.plan
  options = {"start_step": start, "blocks": share.blocks, "block_count": share.count}
  with prepared.batches(workers=0, **options) as batches:
    for step, batch in enumerate(batches, start=start):
      if not wanted[step]:
        continue
      numbers = prompts.record_numbers(plan, step, share.blocks, share.count)
      batch["streams"] = np.where(numbers < 0, 0, np.array(streams, np.int32)[numbers])
      if not plan.row_images[step * plan.rows : (step + 1) * plan.rows].any():
        batch["images"] = batch["images"][:, :0]
      del batch["skipped"]
      batch = hosts.to_device(mesh, batch)
      streams_here, (rows, length) = batch.pop("streams"), batch["tokens"].shape
      yield refill.Batch(batch, streams_here, wanted[step], lengths=np.full(rows, length))


def _stream(record: Record) -> int:
  """Returns a number of the record that does not depend on the list that it is in."""
  prompt = [(turn.human, turn.gpt) for turn in record.turns[:-1]], record.turns[-1].human
  if record.system:
    prompt = record.system, *prompt
  images, *_ = record.content
  return zlib.crc32(f"{record.index} {record.id} {images} {prompt}".encode()) & 0x7FFFFFFF


def _read(source: ModelSource, record: int, generated: Generated) -> Iterator[Answer]:
  """Reads N answers; a record that could not be read has none."""
  for sample, length in enumerate(generated.lengths):
    if not length:
      continue
    tokens = generated.tokens[sample, :length]
    yield Answer(
      record=record,
      sample=sample,
      text=source.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
      tokens=np.asarray(tokens),
      log_probability=float(generated.log_probabilities[sample, :length].sum(dtype=float)),
      ended=bool(generated.ended[sample]),
    )
