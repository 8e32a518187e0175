"""Several answers to one prompt: their log-probabilities and which of them there are.

Rows of preferences have, besides the fields of ARCHITECTURE.md, "Rows", `answers` int32[B, S, K]:
the place of the last token of the answer of rank k of example s, -1 where there is none.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlalign_jax.losses import head
from vlalign_jax.losses.support import Support
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import sft


def flat(x):
  """[B, S, ...] to [B * S, ...], examples one after the other."""
  return x.reshape(-1, *x.shape[2:])


def valid(rows):
  """bool[B, S, K], which answers there are."""
  return rows["answers"] >= 0


def examples(rows):
  """float32[], examples with at least two answers."""
  return jnp.sum(jnp.sum(valid(rows), axis=-1) > 1).astype(jnp.float32)


def scores(model, rows):
  """Returns float32[B, S, K], the score of each answer by a reward model."""
  return model.scores(model(rows), rows["answers"])


def per_answer(values, rows):
  """Sums over the tokens of each answer.

  Args:
    values: float32[B, T], 0 where nothing is to be summed.
    rows: has segments, branches and answers.

  Returns:
    float32[B, S, K].
  """
  S, K = rows["answers"].shape[1:]
  # Everything else, prompts and padding, goes to a place behind the last.
  place = (rows["segments"] - 1) * K + rows["branches"] - 1
  is_answer = (rows["segments"] > 0) & (rows["branches"] > 0)
  place = jnp.where(is_answer, place, S * K)
  sums = jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, S * K + 1))(values, place)
  return sums[:, :-1].reshape(-1, S, K)


def lengths(rows):
  """float32[B, S, K], tokens of each answer, its end included."""
  return per_answer((rows["loss_mask"] != 0).astype(jnp.float32), rows)


def token_log_probabilities(
  model,
  rows,
  *,
  mesh: Mesh | None = None,
  chunk: int = 128,
  temperature: float = 1.0,
  support: Support | None = None,
):
  """float32[B, T], of each answer's tokens, where `loss_mask` is not 0; else 0.

  Args:
    model: a VisionLanguageModel with a language head.
    rows: of preferences.
    mesh: over which rows are split.
    chunk: see `losses.head.cross_entropy_sum`.
    temperature: by which logits are divided.
    support: what is left out of the softmax; None: nothing.
  """
  return head.token_log_probabilities(
    tempered(model(rows), temperature),
    model.head_kernel(),
    rows["targets"],
    rows["loss_mask"],
    scatter=functools.partial(meshes.scatter_head_gradient, mesh=mesh),
    support=support,
    **sft.chunking(mesh, chunk),
  )


def tempered(hidden, temperature: float):
  """Hidden states whose logits are those of `hidden` divided by the temperature."""
  return hidden if temperature == 1 else hidden / temperature


def log_probabilities(model, rows, **options):
  """float32[B, S, K], of each answer as a whole; arguments as of `token_log_probabilities`."""
  return per_answer(token_log_probabilities(model, rows, **options), rows)
