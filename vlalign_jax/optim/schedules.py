"""Learning-rate schedules, by the definitions of transformers' `get_scheduler`."""

import math

import jax.numpy as jnp
import optax


def warmup_steps(optim, total_steps: int) -> int:
  """Returns how many steps warm up: `optim.warmup_steps`, or `optim.warmup_ratio` of all."""
  return optim.warmup_steps or math.ceil(optim.warmup_ratio * total_steps)


def make_schedule(optim, peak: float, total_steps: int) -> optax.Schedule:
  """Learning rate of the update number `count` (from 0).

  Args:
    optim: the config's `optim` group: schedule, warmup_ratio, warmup_steps, cycles, power.
    peak: the learning rate after warm-up.
    total_steps: updates of the whole run.

  Returns:
    Function of int32[] to float32[]. All schedules but `constant` rise linearly from 0 over the
    warm-up, then: `linear` and `polynomial` fall to 0 and 1e-7; `cosine` falls along half a wave;
    `cosine_with_restarts` does so `cycles` times.
  """
  warmup = 0 if optim.schedule == "constant" else warmup_steps(optim, total_steps)
  decay_steps = max(1, total_steps - warmup)
  final = min(1e-7, peak)

  def after_warmup(elapsed):
    done = elapsed / decay_steps
    if optim.schedule == "linear":
      return peak * (1 - done)
    if optim.schedule == "polynomial":
      return (peak - final) * (1 - done) ** optim.power + final
    if optim.schedule == "cosine":
      return peak * 0.5 * (1 + jnp.cos(jnp.pi * done))
    if optim.schedule == "cosine_with_restarts":
      # The remainder of whole numbers: that of a rounded fraction is a whole cycle off at restarts.
      phase = elapsed * optim.cycles % decay_steps / decay_steps
      return peak * jnp.where(elapsed < decay_steps, 0.5 * (1 + jnp.cos(jnp.pi * phase)), 0.0)
    return jnp.full_like(done, peak)

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    rising = peak * count / max(1, warmup)
    elapsed = jnp.clip(count - warmup, 0, decay_steps)
    return jnp.where(count < warmup, rising, after_warmup(elapsed))

  return schedule
