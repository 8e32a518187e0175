"""The data of generation: records up to where their last answer begins, one prompt a row."""

import numpy as np

from vlalign_jax.data import measure, plan
from vlalign_jax.data.encode import Encoded, branch, tokenize_prompt
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.data.records import Record
from vlalign_jax.data.templates import end_tokens
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.weights.source import ModelSource

LENGTH_MULTIPLE = 16


def encode_prompt(
  record: Record,
  template: str,
  tokenizer,
  layout: PictureLayout,
  max_length: int,
) -> Encoded:
  """Encodes a record up to its last answer or answers, which are not read.

  The tokens are those that training on the record puts before that answer. A prompt is never cut:
  `counts` is (1 if it does not fit, else 0,).

  Args:
    record, template, tokenizer, layout, max_length: as for
      `encode.encode`.

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  prompt, _, pictures = tokenize_prompt(record, [], template, tokenizer, layout)
  if len(prompt) > max_length:
    return Encoded(None, (1,))
  return Encoded(branch(prompt, [], record.images, record.where, pictures=pictures), (0,))


def _describe(measured: measure.Measured, max_length: int) -> str:
  too_long = int(measured.counts[:, 0].sum())
  return (
    f"{len(measured.lengths)} records; {too_long} skipped, their prompt does not fit "
    f"data.max_length={max_length}"
  )


TASK = prepare.Task("optional", encode_prompt, _describe, "a prompt that fits")


def prepare_prompts(config, source: ModelSource, records, row_multiple: int) -> prepare.Prepared:
  """Plans one pass over records by length, in batches of at most four row lengths.

  Args:
    config: has `batch_size` and the `data` group.
    source: the model.
    records: the prompts.
    row_multiple: the number of rows of a batch is a multiple of this.

  Raises:
    InputError: no prompt fits.
  """
  load, measured = prepare.measure_records(TASK, config, source, records, "prompts")
  usable = np.flatnonzero(measured.lengths > 0)
  if not len(usable):
    raise InputError(
      f"no prompt of {len(records)} records fits data.max_length={config.data.max_length}; raise it"
    )
  order = usable[np.argsort(measured.lengths[usable], kind="stable")]
  lengths = measured.lengths[order]
  options = {
    "batch_size": min(config.batch_size, len(order)),
    "pack": False,
    "max_length": int(lengths[-1]),
    "buckets": row_lengths(lengths),
  }
  return prepare.lay_out(config, source, load, measured, order, row_multiple, "prompts", **options)


def row_lengths(lengths: np.ndarray) -> list[int]:
  """Returns at most four row lengths, each for a quarter of the prompts: little padding is read.

  Args:
    lengths: int[N], tokens of each prompt, ascending.
  """
  ends = [lengths[(len(lengths) * quarter - 1) // 4] for quarter in (1, 2, 3, 4)]
  return sorted({-(-int(end) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for end in ends})


def record_numbers(
  planned: plan.BatchPlan, step: int, blocks: tuple[int, ...] = (0,), block_count: int = 1
) -> np.ndarray:
  """Returns int32[B], the record of each row of a host's share of a step; -1 for padding rows."""
  per_block = int(planned.row_counts[step]) // block_count
  rows = [block * per_block + row for block in blocks for row in range(per_block)]
  examples = [planned.rows_of(step, row) for row in rows]
  return np.array([numbers[0] if len(numbers) else -1 for numbers in examples], np.int32)


def stop_tokens(source: ModelSource, template: str) -> tuple[int, ...]:
  """Returns the ids that end an answer: the template's and those of the model's generation config.

  Raises:
    InputError: the template does not suit the tokenizer.
  """
  eos = source.generation.eos_token_id
  eos = eos if isinstance(eos, list) else [eos]
  ends = [*end_tokens(template, source.tokenizer), *eos]
  return tuple(sorted({end for end in ends if end is not None}))
