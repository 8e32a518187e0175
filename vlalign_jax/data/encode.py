"""One record to one training example: token ids, image positions, targets and what is learnt."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlalign_jax.data.records import IMAGE_PLACEHOLDER, Record
from vlalign_jax.data.templates import closing, turn_pieces
from vlalign_jax.data.tokens import tokenize_pieces, vocabulary
from vlalign_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Example:
  """One tokenised training example; rows are packed from these.

  tokens: int32[N] ids; an image stands as its tokens_per_image image token ids.
  positions: int32[N] RoPE positions.
  branches: int32[N] 0 for what all answers share; k > 0 for the k-th ranked answer.
  targets: int32[N] id of the next token where loss_mask is 1, else 0.
  loss_mask: float32[N] 1 where the next token belongs to an answer or its end, else 0.
  images: paths in the order in which their tokens appear.
  where: names the record in error messages.
  answers: int32[K] where the last token of each ranked answer is, best first; none in SFT.
  """

  tokens: np.ndarray
  positions: np.ndarray
  branches: np.ndarray
  targets: np.ndarray
  loss_mask: np.ndarray
  images: tuple[str, ...]
  where: str
  answers: np.ndarray = field(default_factory=functools.partial(np.zeros, 0, np.int32))


@dataclass(frozen=True, eq=False)
class Encoded:
  """What became of a record; `example` is None where not even its first turn fits."""

  example: Example | None
  dropped_turns: int

  @property
  def counts(self) -> tuple[int]:
    """Turns dropped, as `prepare.Task` has them."""
    return (self.dropped_turns,)


def encode(
  record: Record,
  template: str,
  tokenizer,
  image_token_id: int,
  tokens_per_image: int,
  max_length: int,
) -> Encoded:
  """Encodes a record whose every turn is answered, for supervised fine-tuning.

  Nothing is ever cut: turns that do not fit are dropped whole from the end, with their images, and
  the eos still closes what is left.

  Args:
    record: the conversation; its last turn needs an answer too.
    template: one of `templates.TEMPLATES`.
    tokenizer: a fast Hugging Face tokenizer.
    image_token_id: id of the tokenizer's `<image>`.
    tokens_per_image: positions that an image takes.
    max_length: the largest number of positions, image positions included.

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  check_image_token(tokenizer, image_token_id)
  turns, where = record.turns, record.where
  if turns[-1].gpt is None:
    raise InputError(f"{where}: the last turn has no answer to learn; give it one")
  pieces = turn_pieces(turns, template, tokenizer, where)
  texts = [piece.text for piece in pieces]
  *ids, final = tokenize_pieces([*texts, closing(template, tokenizer)], tokenizer)

  image_counts = [turn.human.count(IMAGE_PLACEHOLDER) for turn in turns]
  check_placed(ids, image_counts, image_token_id, where)
  sizes = [len(expand(piece, image_token_id, tokens_per_image)) for piece in ids]
  ends = np.cumsum(sizes)[1::2]  # where each turn's answer ends
  kept = int(np.searchsorted(ends, max_length - len(final), side="right"))
  if kept == 0:
    return Encoded(None, len(turns))

  parts = [*ids[: 2 * kept], final]
  learnt = [*(piece.learn for piece in pieces[: 2 * kept]), True]
  parts = [expand(part, image_token_id, tokens_per_image) for part in parts]
  tokens = np.concatenate(parts)
  learn = np.repeat(learnt, [len(part) for part in parts])
  loss_mask = np.append(learn[1:], False)
  example = Example(
    tokens=tokens,
    positions=np.arange(len(tokens), dtype=np.int32),
    branches=np.zeros(len(tokens), np.int32),
    targets=np.where(loss_mask, np.roll(tokens, -1), 0).astype(np.int32),
    loss_mask=loss_mask.astype(np.float32),
    images=record.images[: sum(image_counts[:kept])],
    where=where,
  )
  return Encoded(example, len(turns) - kept)


def check_placed(
  pieces: Sequence[np.ndarray], images: Sequence[int], image_token_id: int, where: str
) -> None:
  """Raises an InputError unless the template has written every image where its question is.

  Args:
    pieces: ids of the prompts and answers in turn, an image as one token.
    images: of each question.
    image_token_id: id of `<image>`.
    where: names the record.
  """
  placed = [int(np.count_nonzero(piece == image_token_id)) for piece in pieces]
  if placed[0::2] != list(images) or any(placed[1::2]):
    raise InputError(
      f"{where}: {sum(placed)} image tokens were written for {sum(images)} images;"
      " choose another data.template"
    )


def expand(ids: np.ndarray, image_token_id: int, tokens_per_image: int) -> np.ndarray:
  """int32[N], every image token repeated for each of the image's positions."""
  return np.repeat(ids, np.where(ids == image_token_id, tokens_per_image, 1))


@functools.lru_cache(maxsize=16)
def check_image_token(tokenizer, image_token_id: int) -> None:
  """Raises an InputError unless the tokenizer reads `<image>` as the one token image_token_id."""
  found = vocabulary(tokenizer).ids(IMAGE_PLACEHOLDER)
  if found != [image_token_id]:
    raise InputError(
      f"the tokenizer reads <image> as {found}, not as the image token {image_token_id};"
      " add <image> to it as one special token with this id"
    )
