"""Several answers to one prompt: their log-probabilities, scores and lengths.

A batch of preferences also has `answers` int32[B, S, K] (see ARCHITECTURE.md, "Rows"): the place of
the last token of the answer of rank k of example s, -1 where there is none.
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
  """Reshapes [B, S, ...] to [B * S, ...], examples one after the other."""
  return x.reshape(-1, *x.shape[2:])


def valid(batch):
  """Returns bool[B, S, K], true where there is an answer."""
  return batch["answers"] >= 0


def examples(batch):
  """Returns float32[], the number of examples with at least two answers."""
  return jnp.sum(jnp.sum(valid(batch), axis=-1) > 1).astype(jnp.float32)


def scores(model, batch):
  """Returns float32[B, S, K], the score of each answer by a reward model."""
  return model.scores(model(batch), batch["answers"])


def per_answer(values, batch):
  """Sums values over the tokens of each answer.

  Args:
    values: float32[B, T], 0 where nothing is to be summed.
    batch: has segments, branches and answers.

  Returns:
    float32[B, S, K].
  """
  S, K = batch["answers"].shape[1:]
  # Prompts and padding go to a place after the last, which is cut off.
  place = (batch["segments"] - 1) * K + batch["branches"] - 1
  is_answer = (batch["segments"] > 0) & (batch["branches"] > 0)
  place = jnp.where(is_answer, place, S * K)
  sums = jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, S * K + 1))(values, place)
  return sums[:, :-1].reshape(-1, S, K)


def lengths(batch):
  """Returns float32[B, S, K], the number of tokens of each answer, its end token included."""
  return per_answer((batch["loss_mask"] != 0).astype(jnp.float32), batch)


def token_log_probabilities(
  model,
  batch,
  *,
  mesh: Mesh | None = None,
  chunk: int = 128,
  temperature: float = 1.0,
  support: Support | None = None,
):
  """Returns the log-probability of each answer token, float32[B, T]; 0 where `loss_mask` is 0.

  Args:
    model: a VisionLanguageModel with a language head.
    batch: of preferences.
    mesh: over which the batch is split.
    chunk: see `losses.head.cross_entropy_sum`.
    temperature: by which logits are divided.
    support: which tokens are in the softmax; None: all.
  """
  return head.token_log_probabilities(
    tempered(model(batch), temperature),
    model.head_kernel(),
    batch["targets"],
    batch["loss_mask"],
    scatter=functools.partial(meshes.scatter_head_gradient, mesh=mesh),
    support=support,
    **sft.chunking(mesh, chunk),
  )


def tempered(hidden, temperature: float):
  """Scales hidden states so that their logits are divided by the temperature."""
  return hidden if temperature == 1 else hidden / temperature


def log_probabilities(model, batch, **options):
  """Returns the log-probability of each answer, float32[B, S, K]; see `token_log_probabilities`."""
  return per_answer(token_log_probabilities(model, batch, **options), batch)
