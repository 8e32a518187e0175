"""Rows of a rollout: each prompt once with its sampled answers behind it as branches.

Everything has its fixed place, so that what is known per token of an answer is an array [B, N, M]
that a slice of the row gives: columns 0 to L - 1 hold the prompt without its last token, at their
end; then come N branches of M + 1 columns, each a copy of that token and an answer's tokens. What
an answer leaves of its columns stays in its branch, behind all that it may see.
"""

import jax.numpy as jnp
import numpy as np

from vlalign_jax.data.blank import GREY

# Rows of a rollout are cut to this share of max_new_tokens, or to all, by its longest answer.
SHARES = (4, 2, 1)


def answer_length(longest: int, most: int) -> int:
  """M of a rollout: few different ones, so that little is compiled and little is padding.

  Args:
    longest: tokens of its longest answer.
    most: max_new_tokens.
  """
  return next(size for part in SHARES if (size := -(-most // part)) >= longest)


def answer_rows(prompts, tokens, lengths):
  """The rows of prompts with answers, see ARCHITECTURE.md, "Rows".

  Args:
    prompts: rows of one prompt each, from their start: tokens, positions, segments and image_slots
      int32[B, L], and images, maybe with `vision_features`, what a tower that stays made of them.
    tokens: int32[B, N, M], of the answers.
    lengths: int32[B, N], how many of these each has; none where there is no prompt.

  Returns:
    dict of arrays [B, L + N * (M + 1)], and the images with what was made of them.
  """
  B, N, M = tokens.shape
  L = prompts["tokens"].shape[1]
  sizes = jnp.sum(prompts["segments"] > 0, axis=1)
  there = sizes[:, None, None] > 0
  last = jnp.maximum(sizes - 1, 0)[:, None]
  # The prompt moves to the end of its columns: tokens of a segment are neighbours.
  place = jnp.arange(L) - (L - last)
  in_prompt = (place >= 0) & (sizes[:, None] > 0)

  def row(name, fill, answers):
    """[B, T] of a field: the prompt's, and of each branch its first column and the others."""
    x = prompts[name]
    prompt = jnp.where(in_prompt, jnp.take_along_axis(x, jnp.maximum(place, 0), axis=1), fill)
    first = jnp.take_along_axis(x, last, axis=1)
    first = jnp.broadcast_to(first[:, :, None], (B, N, 1))
    branches = jnp.concatenate([first, jnp.broadcast_to(answers, (B, N, M))], axis=2)
    return jnp.concatenate([prompt, branches.reshape(B, -1)], axis=1)

  steps = jnp.arange(M)
  numbers = jnp.repeat(jnp.arange(1, N + 1), M + 1)
  learnt = jnp.pad(steps < lengths[:, :, None], ((0, 0), (0, 0), (0, 1)))
  targets = jnp.where(learnt, jnp.pad(tokens, ((0, 0), (0, 0), (0, 1))), 0)

  def behind(x):
    return jnp.pad(x.reshape(B, -1), ((0, 0), (L, 0)))

  return {
    "tokens": row("tokens", 0, tokens),
    "positions": row("positions", 0, sizes[:, None, None] + steps),
    "segments": row("segments", 0, there.astype(jnp.int32)),
    "branches": jnp.broadcast_to(jnp.pad(numbers, (L, 0)), (B, L + N * (M + 1))),
    "targets": behind(targets),
    "loss_mask": behind(learnt).astype(jnp.float32),
    "image_slots": row("image_slots", -1, jnp.full((1, 1, 1), -1, jnp.int32)),
    **{name: prompts[name] for name in ("images", "vision_features") if name in prompts},
  }


def batch_for_scorer(rows: dict, *, same_tower: bool, blank: bool) -> dict:
  """Rows as the reward model or the critic reads them.

  Args:
    rows: of `answer_rows`, maybe with the actor's `vision_features`.
    same_tower: whether the one who reads has the actor's vision tower.
    blank: whether it sees grey pictures, `ppo.blank_images`.
  """
  if not same_tower or blank:
    rows = {name: x for name, x in rows.items() if name != "vision_features"}
  return rows | {"images": jnp.full_like(rows["images"], GREY)} if blank else rows


def select_answers(x, answers: int, length: int):
  """The part of [B, T, ...] that predicts the answers' tokens: [B, N, M, ...].

  Args:
    x: of rows that `answer_rows` made.
    answers: N.
    length: M.
  """
  B, T = x.shape[:2]
  x = x[:, T - answers * (length + 1) :].reshape(B, answers, length + 1, *x.shape[2:])
  return x[:, :, :length]


def answer_steps(row_length: int, answers: int, length: int) -> np.ndarray:
  """int32[T], how many tokens its answer has before the one that each column predicts.

  A prompt's columns, which predict nothing that is learnt, have M.

  Args:
    row_length: T.
    answers: N.
    length: M.
  """
  prompt = np.full(row_length - answers * (length + 1), length)
  return np.concatenate([prompt, np.tile(np.arange(length + 1), answers)]).astype(np.int32)


def last_places(lengths, row_length: int, length: int):
  """int32[B, 1, N], where in its row the last token of each answer is; -1 where there is none.

  Args:
    lengths: int32[B, N], tokens of the answers.
    row_length: T.
    length: M.
  """
  N = lengths.shape[1]
  starts = row_length - (length + 1) * (N - jnp.arange(N))
  return jnp.where(lengths > 0, starts + lengths, -1)[:, None]
