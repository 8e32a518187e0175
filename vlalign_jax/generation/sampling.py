"""Chooses the next token from logits; every setting is fixed at compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlalign_jax.errors import InputError
from vlalign_jax.models.stored import MODEL


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of sampling, in the order in which they are applied (transformers' order).

  Attributes:
    max_new_tokens: the most tokens of an answer, including its stop token.
    num_return_sequences: answers to each prompt.
    stop_tokens: ids that end an answer.
    repetition_penalty: divides positive logits of tokens that prompt or answer have, and multiplies
      negative ones (Keskar et al. 2019, CTRL, 4.1).
    min_new_tokens: no stop token is chosen before so many tokens.
    suppress: ids that are never chosen.
    temperature: divides logits; 0 is greedy decoding.
    top_k: only the k likeliest tokens are candidates (the lowest ids of equal ones); 0: all.
    top_p: only the fewest likeliest candidates whose probabilities sum to at least this (Holtzman
      et al. 2020, "nucleus"), and without top_k those as likely as the last of them; 1: all.
    tempered: whether a token's log-probability is reported at the temperature, among the tokens
      that are not `forbidden`, as PPO's learner and reference compute it.
    cache_dtype: of keys and values, see `models.stored.CACHE_DTYPES`.
  """

  max_new_tokens: int
  num_return_sequences: int = 1
  stop_tokens: tuple[int, ...] = ()
  repetition_penalty: float = 1.0
  min_new_tokens: int = 0
  suppress: tuple[int, ...] = ()
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  tempered: bool = False
  cache_dtype: str = MODEL


def check(sampling: Sampling, vocab_size: int) -> None:
  """Checks settings that make no sense.

  Raises:
    InputError: names the key of the config's `generation` group.
  """
  for name in ("max_new_tokens", "num_return_sequences", "repetition_penalty"):
    if not getattr(sampling, name) > 0:
      raise InputError(f"generation.{name} is {getattr(sampling, name)}; give more than 0")
  for name in ("min_new_tokens", "temperature", "top_k"):
    if not getattr(sampling, name) >= 0:
      raise InputError(f"generation.{name} is {getattr(sampling, name)}; give 0 or more")
  if not 0 < sampling.top_p <= 1:
    raise InputError(f"generation.top_p is {sampling.top_p}; give more than 0 and at most 1")
  if sampling.min_new_tokens > sampling.max_new_tokens:
    raise InputError(
      f"generation.min_new_tokens is {sampling.min_new_tokens}, above generation.max_new_tokens, "
      f"{sampling.max_new_tokens}; lower it"
    )
  if sampling.tempered and not sampling.temperature:
    raise InputError("generation.temperature is 0, which gives no tempered log-probabilities")
  if sampling.temperature == 0 and sampling.num_return_sequences > 1:
    raise InputError(
      f"generation.num_return_sequences is {sampling.num_return_sequences} with "
      "generation.temperature 0, which gives equal answers; raise the temperature or ask for one"
    )
  for name in ("stop_tokens", "suppress"):
    for token in getattr(sampling, name):
      if not 0 <= token < vocab_size:
        raise InputError(
          f"generation.{name} has {token}; the model's ids are 0 to {vocab_size - 1}"
        )


def forbidden(sampling: Sampling, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tokens that are never chosen, whatever the logits are.

  Args:
    sampling: has suppress, stop_tokens and min_new_tokens.
    vocab_size: V.

  Returns:
    (bool[V] tokens forbidden at every step, bool[V] tokens forbidden below min_new_tokens).
  """
  always, early = np.zeros((2, vocab_size), bool)
  always[list(sampling.suppress)] = True
  if sampling.min_new_tokens:
    early[list(sampling.stop_tokens)] = True
  return always, early


def row_keys(seed, prompts, samples: int):
  """Returns random keys [B, N] that depend on (seed, prompt, sample) alone, not on the batch.

  Args:
    seed: int32[].
    prompts: int32[B], numbers that identify prompts.
    samples: N.
  """
  key = jax.random.key(seed)
  fold_samples = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(
    lambda prompt: fold_samples(jax.random.fold_in(key, prompt), jnp.arange(samples))
  )(prompts)


def choose(logits, seen, keys, steps, sampling: Sampling):
  """Chooses the next token of each sample.

  Args:
    logits: float32[B, N, V] of the model.
    seen: bool[B, N, V], tokens of prompt and answer so far; None without a repetition penalty.
    keys: [B, N], from `row_keys`.
    steps: int32[B], number of tokens that the answers have so far.
    sampling: see Sampling.

  Returns:
    (int32[B, N] tokens, float32[B, N] their log-probabilities under the model itself, float32[B, N]
    those under the distribution that was drawn from). If `tempered`, the model's logits are divided
    by the temperature and leave out the tokens that are `forbidden`; then, without a repetition
    penalty, the two differ by the logarithm of the probability that top_k and top_p leave.
  """
  allowed = _mask_forbidden(_penalize(logits, seen, sampling), steps, sampling)
  if sampling.temperature == 0:
    tokens = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    drawn = jnp.zeros(tokens.shape, jnp.float32)
  else:
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))(keys, steps)
    tokens, drawn = _draw(allowed / sampling.temperature, keys, sampling)
  if sampling.tempered:
    logits = _mask_forbidden(logits, steps, sampling) / sampling.temperature
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return tokens, chosen - jax.nn.logsumexp(logits, axis=-1), drawn


def _penalize(logits, seen, sampling: Sampling):
  """Returns logits with the repetition penalty."""
  if seen is None:
    return logits
  penalty = sampling.repetition_penalty
  return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _mask_forbidden(logits, steps, sampling: Sampling):
  """Returns logits with -inf for tokens that must not be chosen."""
  always, early = forbidden(sampling, logits.shape[-1])
  if early.any():
    is_early = (steps < sampling.min_new_tokens)[:, None, None]
    return jnp.where(always | (early & is_early), -jnp.inf, logits)
  return jnp.where(always, -jnp.inf, logits) if always.any() else logits


def _draw(logits, keys, sampling: Sampling):
  """Draws (int32[B, N] tokens, their log-probabilities) from tempered logits float32[B, N, V]."""
  ids = None
  if 0 < sampling.top_k < logits.shape[-1]:
    logits, ids = jax.lax.top_k(logits, sampling.top_k)
  if sampling.top_p < 1:
    probabilities = jax.nn.softmax(logits, axis=-1)
    if ids is None:
      kept = probabilities >= _nucleus_threshold(probabilities, sampling.top_p)
    else:  # likeliest first
      kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
    logits = jnp.where(kept, logits, -jnp.inf)
  # Gumbel-max: the argmax of log-probabilities with Gumbel noise is a draw.
  noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
  place = jnp.argmax(logits + noise, axis=-1)[..., None]
  drawn = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), place, axis=-1)[..., 0]
  tokens = place if ids is None else jnp.take_along_axis(ids, place, axis=-1)
  return tokens[..., 0].astype(jnp.int32), drawn


def _nucleus_threshold(probabilities, top_p: float):
  """Returns the highest threshold such that the probabilities that reach it sum to `top_p` or more.

  Bisects the bits of non-negative floats, which are ordered as integers are, in place of sorting
  the vocabulary.

  Args:
    probabilities: float32[B, N, V].

  Returns:
    float32[B, N, 1].
  """

  def halve(_, bounds):
    low, high = bounds  # `low` reaches top_p, `high` does not
    middle = low + (high - low) // 2
    value = jax.lax.bitcast_convert_type(middle, jnp.float32)
    mass = jnp.sum(jnp.where(probabilities >= value, probabilities, 0), axis=-1, keepdims=True)
    reaches = mass >= top_p
    return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

  low = jnp.zeros((*probabilities.shape[:-1], 1), jnp.int32)
  above_one = jnp.full_like(low, jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1)
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, above_one))
  return jax.lax.bitcast_convert_type(low, jnp.float32)
