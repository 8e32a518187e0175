"""Scores relative to those of the last rollouts, on the host."""

import numpy as np


class ScoreQueue:
  """The last scores, by whose mean and standard deviation new ones are normalised.

  Attributes:
    scores: float64[at most size], the oldest first; all there is to save and restore.
  """

  def __init__(self, size: int = 1000, scale: float = 10.0, scores=()):
    """An empty queue, or one of the `scores` that were saved.

    Args:
      size: how many scores it holds.
      scale: standard deviation of what is returned.
    """
    self.size, self.scale = size, scale
    self.scores = np.asarray(scores, np.float64)[-size:]

  def normalise(self, scores):
    """(score - mean) / std times scale over the queue, which these scores join first.

    Args:
      scores: float[...]; those that are not finite stay as they are and do not join.

    Returns:
      float32[...]; 0 where all scores in the queue are alike.
    """
    scores = np.asarray(scores, np.float64)
    finite = np.isfinite(scores)
    if not finite.any():
      return scores.astype(np.float32)
    self.scores = np.concatenate([self.scores, scores[finite]])[-self.size :]
    deviation = self.scores.std()
    if deviation <= 1e-12 * np.abs(self.scores).max():
      return np.where(finite, 0.0, scores).astype(np.float32)
    normal = (scores - self.scores.mean()) / deviation * self.scale
    return np.where(finite, normal, scores).astype(np.float32)
