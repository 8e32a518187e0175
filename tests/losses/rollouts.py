"""Rollouts of random numbers, with answers of several lengths, and how to compare with them."""

import numpy as np

N, M = 7, 13
RNG = np.random.default_rng(3)
LENGTHS = np.array([M, 1, 5, 0, 9, 2, M - 1])
MASK = np.arange(M) < LENGTHS[:, None]
MASK[4] = np.roll(MASK[4], 3)  # answers need not begin at the front
OLD = -RNG.exponential(2.0, (N, M)).astype(np.float32)
NEW = (OLD + 0.3 * RNG.normal(size=(N, M))).astype(np.float32)
REFERENCE = (OLD + RNG.normal(size=(N, M))).astype(np.float32)
VALUES, OLD_VALUES, RETURNS, ADVANTAGES = RNG.normal(size=(4, N, M)).astype(np.float32)
SCORES = (4 * RNG.normal(size=N)).astype(np.float32)
ENDED = RNG.random(N) < 0.5

# Several answers to a prompt
B, GROUP, LONGEST = 4, 3, 6
GROUP_MASK = np.arange(LONGEST) < RNG.integers(1, LONGEST + 1, (B * GROUP, 1))
GROUP_MASK[0] = True
GROUP_LOGPS = -RNG.exponential(2.0, GROUP_MASK.shape).astype(np.float32)
GROUP_REFERENCE = (GROUP_LOGPS + RNG.normal(size=GROUP_MASK.shape)).astype(np.float32)
GROUP_OLD = (GROUP_LOGPS + 0.2 * RNG.normal(size=GROUP_MASK.shape)).astype(np.float32)
GROUP_SCORES = (50 + 4 * RNG.normal(size=(B, GROUP))).astype(np.float32)
GROUP_SCORES[1, 2] = np.nan  # prompts with two scores, and with one
GROUP_SCORES[2, :2] = np.nan
GROUP_SCORES[3] = 7.0  # all equal
GROUP_ARRAYS = {"logps": GROUP_LOGPS, "reference": GROUP_REFERENCE, "scores": GROUP_SCORES.ravel()}
SCORED = ~np.isnan(GROUP_SCORES)


def close(computed, expected, rel=1e-6):
  """Asserts that arrays differ by at most `rel` of the greatest expected size."""
  computed, expected = np.asarray(computed, np.float64), np.asarray(expected, np.float64)
  assert computed.shape == expected.shape
  np.testing.assert_allclose(computed, expected, rtol=rel, atol=rel * np.abs(expected).max())


def dirty(x):
  """Sets x to nan where there is no token, which must not change results."""
  return np.where(MASK, x, np.nan).astype(np.float32)


def answers(*arrays):
  """Yields, for each answer with tokens, its index and its tokens' values in float64."""
  for n in range(N):
    if MASK[n].any():
      yield n, *(x[n, MASK[n]].astype(np.float64) for x in arrays)


def placed(per_answer):
  """Returns an array [N, M] with each answer's numbers, 0 elsewhere."""
  full = np.zeros((N, M))
  for n, numbers in per_answer.items():
    full[n, MASK[n]] = numbers
  return full
