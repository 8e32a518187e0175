"""Encodes records as examples: token ids, positions, targets and which tokens are learned.

A record is a prompt, which includes the earlier turns, and answers to its last question: one in
SFT, several in rankings, none where the model is to generate it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER, Turn
from vlalign_jax.data.picture_tokens import PictureLayout, PictureTokens, tokens_of_record
from vlalign_jax.data.records import Record
from vlalign_jax.data.templates import closing, turn_pieces
from vlalign_jax.data.tokens import picture_token, tokenize_branches, vocabulary
from vlalign_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One tokenized example; rows are packed from these.

  tokens: int32[N] ids; an image takes those of its `PictureTokens`.
  positions: int32[N] RoPE positions.
  branches: int32[N] 0 for what all answers share; k > 0 for the k-th ranked answer.
  targets: int32[N] id of the next token where loss_mask is 1, else 0.
  loss_mask: float32[N] 1 where the next token belongs to an answer or its end, else 0.
  images: paths in the order in which their tokens appear.
  where: names the record in error messages.
  answers: int32[K] position of the last token of each ranked answer, best first; empty in SFT.
  pictures: the tokens of each of `images`; empty: each image is one tile.
  """

  tokens: np.ndarray
  positions: np.ndarray
  branches: np.ndarray
  targets: np.ndarray
  loss_mask: np.ndarray
  images: tuple[str, ...]
  where: str
  answers: np.ndarray = dataclasses.field(default_factory=functools.partial(np.zeros, 0, np.int32))
  pictures: tuple[PictureTokens, ...] = ()

  @property
  def tiles(self) -> dict[str, int]:
    """Returns distinct image -> its number of tiles."""
    tiles = [picture.tiles for picture in self.pictures] or [1] * len(self.images)
    return dict(zip(self.images, tiles, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """The result of encoding a record.

  Attributes:
    example: None if nothing that fits is left to learn.
    counts: numbers for the log, such as turns dropped; each encoder says which.
    kept: which of the record's ranked answers are branches of the example, from 0, in order.
    apart: answers that fit after the prompt, but not together with those kept.
  """

  example: Example | None
  counts: tuple[int, ...]
  kept: tuple[int, ...] = ()
  apart: tuple[int, ...] = ()


def encode(
  record: Record,
  template: str,
  tokenizer,
  layout: PictureLayout,
  max_length: int,
) -> Encoded:
  """Encodes a conversation whose every turn has an answer; `counts` is (turns dropped,).

  Text is never cut: turns that do not fit are dropped as a whole from the end, with their images,
  and the eos still closes the rest.

  Args:
    record: the conversation; its last turn needs an answer too.
    template: one of `templates.TEMPLATES`.
    tokenizer: a fast Hugging Face tokenizer.
    layout: says which tokens a picture takes.
    max_length: the most positions of an example, image positions included.

  Raises:
    InputError: the template, the tokenizer and the record do not go together.
  """
  turns, last = record.turns, record.turns[-1].gpt
  if last is None:
    raise InputError(f"{record.where}: the last turn has no answer to learn; give it one")
  pieces, [(answer, final)], pictures = tokenize_turns(record, [last], template, tokenizer, layout)
  pieces.append(answer)
  ends = np.cumsum([len(piece) for piece in pieces])[1::2]  # of each turn's answer
  kept = int(np.searchsorted(ends, max_length - len(final), side="right"))
  if kept == 0:
    return Encoded(None, (len(turns),))
  pieces = [*pieces[: 2 * kept], final]
  learned = np.repeat([False, True] * kept + [True], [len(piece) for piece in pieces])
  num_images = sum(turn.human.count(IMAGE_PLACEHOLDER) for turn in turns[:kept])
  images, shown = record.images[:num_images], pictures[:num_images]
  example = branch(np.concatenate(pieces), [], images, record.where, learned, shown)
  return Encoded(example, (len(turns) - kept,))


def tokenize_turns(
  record: Record,
  answers: Sequence[str],
  template: str,
  tokenizer,
  layout: PictureLayout,
) -> tuple[list[np.ndarray], list[list[np.ndarray]], tuple[PictureTokens, ...]]:
  """Tokenizes a record up to its last question, and each of `answers` to that question.

  Args:
    record: its last turn's own answer, if any, is not read.
    answers: may be empty.
    template, tokenizer, layout: as for `encode`.

  Returns:
    (int32[N] ids of each prompt and earlier answer in turn, [ids with the end token, ids of what
    closes the example] of each of `answers`, the tokens of each picture, which are in the prompts).

  Raises:
    InputError: the template, the tokenizer and the record do not go together, or a picture cannot
      be read.
  """
  image_token_id = layout.image_token_id
  check_image_token(tokenizer, image_token_id)
  *before, last = record.turns
  prompt, written, where = [], [], record.where
  for answer in answers or [None]:
    turns = [*before, Turn(last.human, answer)]
    texts = [piece.text for piece in turn_pieces(turns, template, tokenizer, where, record.system)]
    prompt = texts[: 2 * len(before) + 1]  # the same each time
    written += texts[len(prompt) :]
  end = closing(template, tokenizer)
  pieces, branches = tokenize_branches(prompt, [(text, end) for text in written], tokenizer)

  images = [turn.human.count(IMAGE_PLACEHOLDER) for turn in record.turns]
  placed = [np.count_nonzero(ids == image_token_id) for ids in pieces]
  in_answers = [np.count_nonzero(ids == image_token_id) for ids, _ in branches]
  if placed[0::2] != images or any(placed[1::2]) or any(in_answers):
    raise InputError(
      f"{record.where}: {sum(placed + in_answers)} image tokens were written for {sum(images)}"
      " images; choose another data.template"
    )
  pictures = tokens_of_record(record, layout)
  rest = iter(pictures)
  return [_with_pictures(ids, image_token_id, rest) for ids in pieces], branches, pictures


def _with_pictures(
  ids: np.ndarray, image_token_id: int, pictures: Iterator[PictureTokens]
) -> np.ndarray:
  """Returns ids with each image token replaced by the tokens of the next picture."""
  places = np.flatnonzero(ids == image_token_id)
  if not len(places):
    return ids
  parts = np.split(ids, np.stack([places, places + 1], axis=1).reshape(-1))
  parts[1::2] = [next(pictures).ids for _ in places]
  return np.concatenate(parts)


def tokenize_prompt(
  record: Record, answers: Sequence[str], *options
) -> tuple[np.ndarray, list[np.ndarray], tuple[PictureTokens, ...]]:
  """Tokenizes a record up to its last question, in one piece, and answers to that question.

  Args:
    record, answers, *options: as for `tokenize_turns`.

  Returns:
    (int32[N] ids of the prompt, int32[M] ids of each answer with what closes the example, the
    tokens of each picture).

  Raises:
    InputError: as there, or the prompt is empty.
  """
  pieces, branches, pictures = tokenize_turns(record, answers, *options)
  prompt = np.concatenate(pieces)
  if not len(prompt):
    raise InputError(f"{record.where}: the prompt has no token; choose another data.template")
  return prompt, [np.concatenate(ids) for ids in branches], pictures


def fit_answers(
  prompt: np.ndarray, answers: dict[int, np.ndarray], max_length: int
) -> tuple[int, ...]:
  """Returns the keys of the answers that fit in one example, chosen in order; none is cut."""
  length, kept = len(prompt) - 1, []
  for key, ids in answers.items():
    if length + 1 + len(ids) <= max_length:
      kept.append(key)
      length += 1 + len(ids)
  return tuple(kept)


def branch(
  prompt: np.ndarray,
  answers: Sequence[np.ndarray],
  images: tuple[str, ...],
  where: str,
  learned: np.ndarray | bool = False,
  pictures: tuple[PictureTokens, ...] = (),
) -> Example:
  """Makes an example of a prompt (branch 0) and answers to it (branches k > 0).

  With answers, branch 0 stops one token short. Every other branch begins with a copy of the
  prompt's last token, at the same position, and goes on with its answer.

  Args:
    prompt: int32[N] ids of what all answers share; a whole conversation has no answers.
    answers: int32[M] ids of each, with its end; all of them are learned.
    images, where, pictures: as in Example.
    learned: which tokens of the prompt are learned: none, or bool[N] if there are no answers.
  """
  shared = len(prompt) - bool(answers)
  sizes = np.array([shared, *(1 + len(answer) for answer in answers)])
  starts = np.cumsum(sizes) - sizes
  tokens = [prompt[:shared], *(part for answer in answers for part in (prompt[-1:], answer))]
  tokens = np.concatenate(tokens).astype(np.int32)
  offsets = np.append(0, starts[1:] - shared)  # place - position
  positions = np.arange(len(tokens)) - np.repeat(offsets, sizes)
  is_learned = np.ones(len(tokens), bool)
  is_learned[:shared] = learned
  is_learned[starts[1:]] = False
  loss_mask = np.append(is_learned[1:], False)
  return Example(
    tokens=tokens,
    positions=positions.astype(np.int32),
    branches=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
    targets=np.where(loss_mask, np.roll(tokens, -1), 0).astype(np.int32),
    loss_mask=loss_mask.astype(np.float32),
    images=images,
    where=where,
    answers=(starts + sizes - 1)[1:].astype(np.int32),
    pictures=pictures,
  )


@functools.lru_cache(maxsize=16)
def check_image_token(tokenizer, image_token_id: int) -> None:
  """Raises an InputError unless the tokenizer reads `<image>` as the one token image_token_id."""
  ids = vocabulary(tokenizer).ids(IMAGE_PLACEHOLDER)
  if ids != [image_token_id]:
    raise InputError(
      f"the tokenizer reads {picture_token(tokenizer)} as {ids}, not as the image token "
      f"{image_token_id}; add it as one special token with this id"
    )
