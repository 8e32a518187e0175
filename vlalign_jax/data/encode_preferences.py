"""One record with ranked answers to one example: the prompt once, each answer as its branch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.data.encode import Example, check_image_token, check_placed, expand
from vlalign_jax.data.records import Record
from vlalign_jax.data.templates import closing, turn_pieces
from vlalign_jax.data.tokens import tokenize_branches
from vlalign_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class EncodedPreferences:
  """What became of a record's ranked answers.

  Attributes:
    example: None where fewer than two answers are left.
    kept: which of the record's answers are its branches, from 0, in order.
    equal: answers left out because a better one has the same tokens.
    empty: answers left out because nothing is in them.
    too_long: answers left out because they do not fit.
  """

  example: Example | None
  kept: tuple[int, ...]
  equal: int
  empty: int
  too_long: int

  @property
  def counts(self) -> tuple[int, int, int, int]:
    """Answers kept, equal, empty and too long."""
    return len(self.kept), self.equal, self.empty, self.too_long


def encode_preferences(
  record: Record,
  template: str,
  tokenizer,
  image_token_id: int,
  tokens_per_image: int,
  max_length: int,
) -> EncodedPreferences:
  """Encodes a record's prompt as branch 0 and each ranked answer as a branch k > 0.

  Branch 0 stops one token short. Every other branch begins with a copy of the prompt's last token,
  at the same position, goes on with the answer exactly as `encode.encode` writes it behind that
  prompt, and ends with its end token. Only the answer and its end are learnt.

  Nothing is ever cut: in the order of rank, an answer goes in if the whole segment (the prompt, and
  all answers so far) still fits, and is left out whole if not.

  Args:
    record: with ranked answers to its last question.
    template: one of `templates.TEMPLATES`.
    tokenizer: a fast Hugging Face tokenizer.
    image_token_id: id of the tokenizer's `<image>`.
    tokens_per_image: positions that an image takes.
    max_length: the largest number of tokens of the segment, image positions included.

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  check_image_token(tokenizer, image_token_id)
  ranks = [rank for rank, answer in enumerate(record.answers) if answer.strip()]
  empty = len(record.answers) - len(ranks)
  if len(ranks) < 2:
    return EncodedPreferences(None, tuple(ranks), 0, empty, 0)

  prompt, answers = answer_texts(record, ranks, template, tokenizer)
  end = closing(template, tokenizer)
  pieces, branches = tokenize_branches(prompt, [(answer, end) for answer in answers], tokenizer)
  images = [turn.human.count(IMAGE_PLACEHOLDER) for turn in record.turns]
  for answer, _ in branches:
    check_placed([*pieces, answer], images, image_token_id, record.where)
  trunk = expand(np.concatenate(pieces), image_token_id, tokens_per_image)
  if not len(trunk):
    raise InputError(f"{record.where}: the prompt has no token; choose another data.template")

  length, kept, equal, too_long, found = len(trunk) - 1, [], 0, 0, []
  for rank, ids in zip(ranks, map(np.concatenate, branches), strict=True):
    if any(np.array_equal(ids, better) for better in found):
      equal += 1
      continue
    found.append(ids)
    if length + 1 + len(ids) > max_length:
      too_long += 1
      continue
    kept.append((rank, ids))
    length += 1 + len(ids)
  example = None
  if len(kept) > 1:
    example = branch(trunk, [ids for _, ids in kept], record.images, record.where)
  return EncodedPreferences(example, tuple(rank for rank, _ in kept), equal, empty, too_long)


def answer_texts(
  record: Record, ranks: Sequence[int], template: str, tokenizer
) -> tuple[list[str], list[str]]:
  """The text of a record and of some of its ranked answers.

  Args:
    record: with ranked answers to its last question.
    ranks: which of the answers, counted from 0; at least one.
    template: one of `templates.TEMPLATES`.
    tokenizer: a fast Hugging Face tokenizer.

  Returns:
    (pieces of the prompt, the text of each answer with its end token).
  """
  *before, last = record.turns
  prompt, answers = [], []
  for rank in ranks:
    turns = [*before, replace(last, gpt=record.answers[rank])]
    *texts, answer = (piece.text for piece in turn_pieces(turns, template, tokenizer, record.where))
    prompt = texts  # the same each time
    answers.append(answer)
  return prompt, answers


def branch(
  trunk: np.ndarray, answers: Sequence[np.ndarray], images: tuple[str, ...], where: str
) -> Example:
  """The example of a prompt and answers to it, all of which are learnt.

  Args:
    trunk: int32[N] ids of the prompt, image positions included.
    answers: int32[M] ids of each, its end included.
    images: as of Example.
    where: names the record in error messages.
  """
  shared = len(trunk) - 1
  branches = [np.concatenate([trunk[-1:], answer]) for answer in answers]
  sizes = np.array([len(branch) for branch in branches])
  tokens = np.concatenate([trunk[:-1], *branches]).astype(np.int32)
  ends = shared + np.cumsum(sizes)
  loss_mask = np.ones(len(tokens), np.float32)
  loss_mask[:shared] = 0
  loss_mask[ends - 1] = 0  # nothing follows an answer's end
  positions = np.concatenate([np.arange(shared), *(shared + np.arange(size) for size in sizes)])
  return Example(
    tokens=tokens,
    positions=positions.astype(np.int32),
    branches=np.repeat(np.arange(len(sizes) + 1), [shared, *sizes]).astype(np.int32),
    targets=np.where(loss_mask > 0, np.roll(tokens, -1), 0).astype(np.int32),
    loss_mask=loss_mask,
    images=images,
    where=where,
    answers=(ends - 1).astype(np.int32),
  )
