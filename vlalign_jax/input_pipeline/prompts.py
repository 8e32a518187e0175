"""The data of generation: records up to where their last answer begins, one prompt a row."""

from dataclasses import dataclass

import numpy as np

from vlalign_jax.data import measure, plan
from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.data.encode import Example, check_image_token, check_placed, expand
from vlalign_jax.data.records import Record
from vlalign_jax.data.templates import end_tokens, prompt_pieces
from vlalign_jax.data.tokens import tokenize_pieces
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.weights.source import ModelSource

LENGTH_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
  """What became of a record; `example` is None where its prompt does not fit."""

  example: Example | None

  @property
  def counts(self) -> tuple[int]:
    """Prompts too long, as `prepare.Task` has them."""
    return (int(self.example is None),)


def encode_prompt(
  record: Record,
  template: str,
  tokenizer,
  image_token_id: int,
  tokens_per_image: int,
  max_length: int,
) -> EncodedPrompt:
  """Encodes a record up to its last answer, which may be absent, one, or ranked ones: none is read.

  The tokens are those that training on the record puts before that answer. A prompt is never cut.

  Args:
    record, template, tokenizer, image_token_id, tokens_per_image: as of `encode.encode`.
    max_length: the largest number of positions, image positions included.

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  check_image_token(tokenizer, image_token_id)
  pieces = prompt_pieces(record.turns, template, tokenizer, record.where)
  ids = tokenize_pieces([piece.text for piece in pieces], tokenizer)
  images = [turn.human.count(IMAGE_PLACEHOLDER) for turn in record.turns]
  check_placed(ids, images, image_token_id, record.where)
  tokens = expand(np.concatenate(ids), image_token_id, tokens_per_image)
  if not len(tokens):
    raise InputError(f"{record.where}: the prompt has no token; choose another data.template")
  if len(tokens) > max_length:
    return EncodedPrompt(None)
  nothing = np.zeros(len(tokens), np.int32)
  positions = np.arange(len(tokens), dtype=np.int32)
  loss_mask = nothing.astype(np.float32)
  return EncodedPrompt(
    Example(tokens, positions, nothing, nothing, loss_mask, record.images, record.where)
  )


def _describe(measured: measure.Measured, max_length: int) -> str:
  long = int(measured.counts[:, 0].sum())
  return (
    f"{len(measured.lengths)} records; {long} skipped, their prompt does not fit "
    f"data.max_length={max_length}"
  )


TASK = prepare.Task("optional", encode_prompt, _describe, "a prompt that fits")


def prepare_prompts(config, source: ModelSource, records, row_multiple: int) -> prepare.Prepared:
  """Plans one pass over records, prompts of like lengths together, in at most four row lengths.

  Args:
    config: has `batch_size` and the `data` group.
    source: the model.
    records: the prompts.
    row_multiple: rows of a batch are a multiple of this.

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
  """At most four row lengths, each for a quarter of the prompts: padding is read at every token.

  Args:
    lengths: int[N], tokens of each prompt, ascending.
  """
  ends = [lengths[(len(lengths) * quarter - 1) // 4] for quarter in (1, 2, 3, 4)]
  return sorted({-(-int(end) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for end in ends})


def record_numbers(
  planned: plan.BatchPlan, step: int, blocks: tuple[int, ...] = (0,), block_count: int = 1
) -> np.ndarray:
  """int32[B], the record of each row of a host's share of a step; -1 for rows that only pad."""
  per_block = int(planned.row_counts[step]) // block_count
  rows = [block * per_block + row for block in blocks for row in range(per_block)]
  found = [planned.rows_of(step, row) for row in rows]
  return np.array([numbers[0] if len(numbers) else -1 for numbers in found], np.int32)


def stop_tokens(source: ModelSource, template: str) -> tuple[int, ...]:
  """The ids that end an answer: what the template puts behind one, and the model's own ends.

  Raises:
    InputError: the template does not suit the tokenizer.
  """
  own = source.generation.eos_token_id
  own = own if isinstance(own, list) else [own]
  ends = [*end_tokens(template, source.tokenizer), *own]
  return tuple(sorted({end for end in ends if end is not None}))
