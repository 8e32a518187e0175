"""Supervised fine-tuning: cross-entropy of the assistant's tokens, and evaluation's metrics."""

import math

import jax
import jax.numpy as jnp

from vlalign_jax.losses import head


def loss(hidden, kernel, batch, **chunking):
  """Returns the sum of cross-entropies over learned tokens, and their number.

  Args:
    hidden: float[B, T, D] of the model.
    kernel: float[D, V] of the output head.
    batch: dict with `targets` int32[B, T] and `loss_mask` float32[B, T].
    **chunking: fields of `chunks.Chunking`.

  Returns:
    (float32[] sum, float32[] count); the step divides one by the other.
  """
  targets, loss_mask = batch["targets"], batch["loss_mask"]
  total = head.cross_entropy_sum(hidden, kernel, targets, loss_mask, **chunking)
  return total, jnp.sum(loss_mask)


def evaluation(hidden, kernel, batch, *, max_segments: int, **chunking):
  """Computes sums for token accuracy, exact match and perplexity.

  An answer matches greedy decoding iff each of its tokens is the argmax after the tokens before it.
  An example matches exactly iff all of its answers do.

  Args:
    hidden, kernel, batch, **chunking: as in `loss`; batch also has `segments` int32[B, T].
    max_segments: upper bound of `segments`.

  Returns:
    Dict of float32[] sums: `loss`, `tokens`, `correct_tokens`, `examples`, `exact_examples`.
  """
  loss_mask = batch["loss_mask"]
  losses, correct = head.token_statistics(hidden, kernel, batch["targets"], loss_mask, **chunking)
  # Segment 0 is padding, where the loss_mask is 0.
  sum_by_segment = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, max_segments + 1))
  learned = sum_by_segment((loss_mask != 0).astype(jnp.float32), batch["segments"])
  matching = sum_by_segment(correct.astype(jnp.float32), batch["segments"])
  return {
    "loss": jnp.sum(losses * loss_mask),
    "tokens": jnp.sum(loss_mask),
    "correct_tokens": jnp.sum(correct * loss_mask),
    "examples": jnp.sum(learned > 0).astype(jnp.float32),
    "exact_examples": jnp.sum((learned > 0) & (learned == matching)).astype(jnp.float32),
  }


def summary(totals: dict[str, float]) -> dict[str, float]:
  """Returns evaluation's metrics from the sums of `evaluation` over all batches.

  Returns:
    loss (mean per learned token), perplexity, token_accuracy, exact_match, examples.
  """
  loss = totals["loss"] / totals["tokens"]
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "token_accuracy": totals["correct_tokens"] / totals["tokens"],
    "exact_match": totals["exact_examples"] / totals["examples"],
    "examples": totals["examples"],
  }
