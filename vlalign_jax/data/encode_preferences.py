"""Encodes a record with ranked answers: the prompt once, each answer as a branch after it."""

from vlalign_jax.data.encode import Encoded, branch, fit_answers, tokenize_prompt
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.data.records import Record


def encode_preferences(
  record: Record,
  template: str,
  tokenizer,
  layout: PictureLayout,
  max_length: int,
) -> Encoded:
  """Encodes a record's prompt as branch 0 and its ranked answers as branches, see `branch`.

  An answer and its end token have the ids that `encode` gives them after that prompt. Only they
  are learned, and none is cut: in the order of rank, an answer is kept if the example with all
  answers so far still fits. There is an example if at least two answers are kept.

  Args:
    record: with ranked answers to its last question.
    template, tokenizer, layout, max_length: as for `encode.encode`.

  Returns:
    `counts` is the number of answers (kept, with the tokens of a better one, empty, too long).

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  ranks = [rank for rank, answer in enumerate(record.answers) if answer.strip()]
  empty = len(record.answers) - len(ranks)
  if len(ranks) < 2:
    return Encoded(None, (len(ranks), 0, empty, 0), tuple(ranks))

  texts = [record.answers[rank] for rank in ranks]
  options = template, tokenizer, layout
  prompt, answers, pictures = tokenize_prompt(record, texts, *options)
  distinct, seen = {}, set()
  for rank, ids in zip(ranks, answers, strict=True):
    if ids.tobytes() not in seen:
      seen.add(ids.tobytes())
      distinct[rank] = ids
  kept = fit_answers(prompt, distinct, max_length)
  counts = len(kept), len(ranks) - len(distinct), empty, len(distinct) - len(kept)
  example = None
  if len(kept) > 1:
    chosen = [distinct[rank] for rank in kept]
    example = branch(prompt, chosen, record.images, record.where, pictures=pictures)
  return Encoded(example, counts, kept)
