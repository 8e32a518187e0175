"""Answers of several lengths with random numbers for their tokens, and how numbers compare."""

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
GROUP_SCORES[1, 2] = np.nan  # one without a score, two without, none with one
GROUP_SCORES[2, :2] = np.nan
GROUP_SCORES[3] = 7.0  # all alike
GROUP_ARRAYS = {"logps": GROUP_LOGPS, "reference": GROUP_REFERENCE, "scores": GROUP_SCORES.ravel()}
SCORED = ~np.isnan(GROUP_SCORES)


def close(found, wanted, rel=1e-6):
  """Whether arrays differ by no more than rel of the size of what is wanted."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  assert found.shape == wanted.shape
  np.testing.assert_allclose(found, wanted, rtol=rel, atol=rel * np.abs(wanted).max())


def dirty(x):
  """x with nan where no token is, which must not matter."""
  return np.where(MASK, x, np.nan).astype(np.float32)


def answers(*arrays):
  """Of each answer that has tokens: its number and its tokens' numbers in float64."""
  for n in range(N):
    if MASK[n].any():
      yield n, *(x[n, MASK[n]].astype(np.float64) for x in arrays)


def placed(per_answer):
  """[N, M] of each answer's numbers, 0 elsewhere."""
  full = np.zeros((N, M))
  for n, numbers in per_answer.items():
    full[n, MASK[n]] = numbers
  return full
