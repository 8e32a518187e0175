"""KL divergence of the policy from its reference: estimates per token, and the coefficient."""

import math

import jax.numpy as jnp

from vlalign_jax.errors import InputError

KINDS = ("k1", "k3")

# Coefficients of (e^r - 1 - r) / (r^2 / 2) = sum over k of 2 r^k / (k + 2)!, highest power first.
_SERIES = tuple(2 / math.factorial(k + 2) for k in reversed(range(8)))


def check_kind(kind: str) -> None:
  """Raises InputError for an estimator that is not one of KINDS."""
  if kind not in KINDS:
    raise InputError(f"ppo.kl_estimator={kind!r}: choose one of {', '.join(KINDS)}")


def estimate(logps, reference, kind: str = "k1"):
  """Estimates KL(policy || reference) from each token that the policy sampled.

  The estimates are unbiased if tokens are sampled from the policy without top-k or top-p.

  With r = reference - logps (Schulman 2020, "Approximating KL divergence"):
    k1: -r; may be below 0.
    k3: e^r - 1 - r, never below 0 and of less variance; the estimator of GRPO (Shao et al. 2024,
      equation 4). It is very large for tokens that are much likelier under the reference.

  Args:
    logps: float32[N, M], log-probabilities of the tokens by the policy.
    reference: float32[N, M], the same by the reference.
    kind: one of KINDS.

  Returns:
    float32[N, M]; arbitrary where there is no token (the functions that take it mask it).
  """
  check_kind(kind)
  r = reference.astype(jnp.float32) - logps.astype(jnp.float32)
  if kind == "k1":
    return -r
  # Near 0, where a policy starts, rounding errors would exceed the difference.
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
  """Returns the penalty's coefficient after a rollout (Ziegler et al. 2019, section 2.2).

  coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon). The paper has 0.1 for
  answers / horizon; the horizon comes from the authors' code and early TRL.

  Args:
    coefficient: during the rollout.
    kl: mean over the rollout's answers of the sum over tokens of `estimate`; if it is not finite,
      the coefficient does not change.
    answers: number of answers in the rollout.
    target: desired value of kl; None: the coefficient does not change.
    horizon: number of answers over which a constant error of 1 % changes it by about 1 %.
  """
  if target is None or not math.isfinite(kl):
    return coefficient
  error = min(max(kl / target - 1, -0.2), 0.2)
  return coefficient * (1 + error * answers / horizon)
