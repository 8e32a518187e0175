"""Supervised fine-tuning: cross-entropy of the assistant's tokens, and what evaluation reports."""

import math

import jax
import jax.numpy as jnp

from vlalign_jax.losses import head


def loss(hidden, kernel, rows, **chunking):
  """Sum of cross-entropies over learnt tokens, and their number.

  Args:
    hidden: float[B, T, D] of the model.
    kernel: float[D, V] of the output head.
    rows: dict with `targets` int32[B, T] and `loss_mask` float32[B, T].
    **chunking: shards, chunk, place and scatter of `head.cross_entropy_sum`.

  Returns:
    (float32[] sum, float32[] count); the step divides one by the other.
  """
  targets, loss_mask = rows["targets"], rows["loss_mask"]
  total = head.cross_entropy_sum(hidden, kernel, targets, loss_mask, **chunking)
  return total, jnp.sum(loss_mask)


def evaluation(hidden, kernel, rows, *, max_segments: int, **chunking):
  """Sums for token accuracy, exact match and perplexity.

  An answer is what greedy decoding would give iff each of its tokens is the argmax given the ones
  before; an example matches exactly iff all of its answers do.

  Args:
    hidden, kernel, rows, **chunking: as in `loss`, without scatter; rows also has `segments`
      int32[B, T].
    max_segments: upper bound of `segments`.

  Returns:
    Dict of float32[] sums: `loss`, `tokens`, `correct_tokens`, `examples`, `exact_examples`.
  """
  loss_mask = rows["loss_mask"]
  losses, correct = head.token_statistics(hidden, kernel, rows["targets"], loss_mask, **chunking)
  # Counts per example of a row: segment 0 is padding and has no loss_mask.
  per_row = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, max_segments + 1))
  learnt = per_row((loss_mask != 0).astype(jnp.float32), rows["segments"])
  right = per_row(correct.astype(jnp.float32), rows["segments"])
  return {
    "loss": jnp.sum(losses * loss_mask),
    "tokens": jnp.sum(loss_mask),
    "correct_tokens": jnp.sum(correct * loss_mask),
    "examples": jnp.sum(learnt > 0).astype(jnp.float32),
    "exact_examples": jnp.sum((learnt > 0) & (learnt == right)).astype(jnp.float32),
  }


def summary(totals: dict[str, float]) -> dict[str, float]:
  """What evaluation reports.

  Args:
    totals: the sums of `evaluation` over all batches.

  Returns:
    loss (mean per learnt token), perplexity, token_accuracy, exact_match, examples.
  """
  loss = totals["loss"] / totals["tokens"]
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "token_accuracy": totals["correct_tokens"] / totals["tokens"],
    "exact_match": totals["exact_examples"] / totals["examples"],
    "examples": totals["examples"],
  }
