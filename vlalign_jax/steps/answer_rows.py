"""The batch of a rollout: a row has one prompt and its sampled answers as branches.

Columns are fixed, so that a slice of a row gives an array [B, N, M] per answer token. Columns 0 to
L - 1 hold the prompt without its last token, aligned to the right. Then come N branches of M + 1
columns: a copy of that token, then the answer. Columns that a short answer leaves free belong to
its branch, after all that the answer may see.
"""

import jax.numpy as jnp
import numpy as np

from vlalign_jax.data.blank import GRAY

# The longest answer decides which share of max_new_tokens a rollout has room for: 1/4, 1/2 or all.
SHARES = (4, 2, 1)


def answer_length(longest: int, most: int) -> int:
  """Returns M of a rollout: one of three sizes, so that few shapes are compiled.

  Args:
    longest: tokens of its longest answer.
    most: max_new_tokens.
  """
  return next(size for part in SHARES if (size := -(-most // part)) >= longest)


def answer_rows(prompts, tokens, lengths):
  """Lays out prompts with their answers, see ARCHITECTURE.md, "Rows".

  Args:
    prompts: a batch of one prompt a row, aligned to the left: tokens, positions, segments and
      image_slots int32[B, L], images, and maybe `vision_features`, the output of a frozen tower.
    tokens: int32[B, N, M], of the answers.
    lengths: int32[B, N], how many tokens each answer has; 0 where there is no prompt.

  Returns:
    dict of arrays [B, L + N * (M + 1)], and the images with their features.
  """
  B, N, M = tokens.shape
  L = prompts["tokens"].shape[1]
  sizes = jnp.sum(prompts["segments"] > 0, axis=1)
  has_prompt = sizes[:, None, None] > 0
  last = jnp.maximum(sizes - 1, 0)[:, None]
  # The prompt is aligned to the right, so that tokens of a segment are neighbors.
  place = jnp.arange(L) - (L - last)
  in_prompt = (place >= 0) & (sizes[:, None] > 0)

  def lay_out(name, fill, answers):
    """Returns a field [B, T]: the prompt, then each branch's first column and the others."""
    x = prompts[name]
    prompt = jnp.where(in_prompt, jnp.take_along_axis(x, jnp.maximum(place, 0), axis=1), fill)
    first = jnp.take_along_axis(x, last, axis=1)
    first = jnp.broadcast_to(first[:, :, None], (B, N, 1))
    branches = jnp.concatenate([first, jnp.broadcast_to(answers, (B, N, M))], axis=2)
    return jnp.concatenate([prompt, branches.reshape(B, -1)], axis=1)

  steps = jnp.arange(M)
  numbers = jnp.repeat(jnp.arange(1, N + 1), M + 1)
  in_answer = jnp.pad(steps < lengths[:, :, None], ((0, 0), (0, 0), (0, 1)))
  targets = jnp.where(in_answer, jnp.pad(tokens, ((0, 0), (0, 0), (0, 1))), 0)

  def behind(x):
    return jnp.pad(x.reshape(B, -1), ((0, 0), (L, 0)))

  return {
    "tokens": lay_out("tokens", 0, tokens),
    "positions": lay_out("positions", 0, sizes[:, None, None] + steps),
    "segments": lay_out("segments", 0, has_prompt.astype(jnp.int32)),
    "branches": jnp.broadcast_to(jnp.pad(numbers, (L, 0)), (B, L + N * (M + 1))),
    "targets": behind(targets),
    "loss_mask": behind(in_answer).astype(jnp.float32),
    "image_slots": lay_out("image_slots", -1, jnp.full((1, 1, 1), -1, jnp.int32)),
    **{name: prompts[name] for name in ("images", "vision_features") if name in prompts},
  }


def batch_for_scorer(batch: dict, *, same_tower: bool, blank: bool) -> dict:
  """Returns a batch as the reward model or the critic reads it.

  Args:
    batch: of `answer_rows`, maybe with the actor's `vision_features`.
    same_tower: whether the model has the actor's vision tower.
    blank: whether it sees gray pictures, `ppo.blank_images`.
  """
  if not same_tower or blank:
    batch = {name: x for name, x in batch.items() if name != "vision_features"}
  return batch | {"images": jnp.full_like(batch["images"], GRAY)} if blank else batch


def select_answers(x, answers: int, length: int):
  """Slices from [B, T, ...] what predicts the tokens of the answers: [B, N, M, ...].

  Args:
    x: of a batch that `answer_rows` made.
    answers: N.
    length: M.
  """
  B, T = x.shape[:2]
  x = x[:, T - answers * (length + 1) :].reshape(B, answers, length + 1, *x.shape[2:])
  return x[:, :, :length]


def answer_steps(row_length: int, answers: int, length: int) -> np.ndarray:
  """Returns int32[T], the number of answer tokens before the one that each column predicts.

  Columns of the prompt, whose predictions are not trained, have M.

  Args:
    row_length: T.
    answers: N.
    length: M.
  """
  prompt = np.full(row_length - answers * (length + 1), length)
  return np.concatenate([prompt, np.tile(np.arange(length + 1), answers)]).astype(np.int32)


def last_places(lengths, row_length: int, length: int):
  """Returns int32[B, 1, N], the column of the last token of each answer; -1 where there is none.

  Args:
    lengths: int32[B, N], number of tokens of each answer.
    row_length: T.
    length: M.
  """
  N = lengths.shape[1]
  starts = row_length - (length + 1) * (N - jnp.arange(N))
  return jnp.where(lengths > 0, starts + lengths, -1)[:, None]
