"""How far the policy is from its reference: estimates per token, and the penalty's coefficient."""

import math

import jax.numpy as jnp

from vlalign_jax.errors import InputError

KINDS = ("k1", "k3")

# Of (e^r - 1 - r) / (r^2 / 2), the sum over k of 2 r^k / (k + 2)!, highest first.
_SERIES = tuple(2 / math.factorial(k + 2) for k in reversed(range(8)))


def check_kind(kind: str) -> None:
  """Raises InputError for an estimator that is not one of KINDS."""
  if kind not in KINDS:
    raise InputError(f"ppo.kl_estimator={kind!r}: choose one of {', '.join(KINDS)}")


def estimate(logps, reference, kind: str = "k1"):
  """Estimate of KL(policy || reference) from each token that the policy sampled.

  Unbiased of what the policy itself samples: not where top-k or top-p cut something off.

  With r = reference - logps (Schulman 2020, "Approximating KL divergence"):
    k1: -r; may be below 0.
    k3: e^r - 1 - r, never below 0 and of less variance; the estimator of GRPO (Shao et al. 2024,
      equation 4). It grows exponentially where the reference is the far likelier one.

  Args:
    logps: float32[N, M], log-probabilities of the tokens by the policy.
    reference: float32[N, M], the same by the reference.
    kind: one of KINDS.

  Returns:
    float32[N, M]; what it is where there is no token does not matter to the functions that take it.
  """
  check_kind(kind)
  r = reference.astype(jnp.float32) - logps.astype(jnp.float32)
  if kind == "k1":
    return -r
  # Near 0 the difference would be all rounding, and a policy begins there.
  near = jnp.abs(r) < 0.5
  small = jnp.where(near, r, 0.0)
  large = jnp.where(near, 0.0, r)
  series = jnp.zeros_like(r)
  for coefficient in _SERIES:
    series = series * small + coefficient
  return jnp.where(near, series * small**2 / 2, jnp.expm1(large) - large)


def next_coefficient(
  coefficient: float, kl: float, answers: int, *, target: float | None, horizon: float
) -> float:
  """The coefficient of the penalty after a rollout (Ziegler et al. 2019, section 2.2).

  It grows by a factor 1 + clip(kl / target - 1, -0.2, 0.2) answers / horizon, with the horizon that
  their code and early TRL have for the paper's constant 0.1 (a tenth of the horizon a rollout).

  Args:
    coefficient: the one of that rollout.
    kl: mean over its answers of the sum over tokens of `estimate`; if it is not finite, then the
      coefficient stays.
    answers: number of its answers.
    target: value of kl that is aimed at; None for a fixed coefficient.
    horizon: number of answers over which a constant error of 1 % changes it by about 1 %.
  """
  if target is None or not math.isfinite(kl):
    return coefficient
  error = min(max(kl / target - 1, -0.2), 0.2)
  return coefficient * (1 + error * answers / horizon)
