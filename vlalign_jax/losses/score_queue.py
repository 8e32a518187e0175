"""Normalization of scores by those of the last rollouts, on the host."""

import numpy as np


class ScoreQueue:
  """Keeps the last scores, whose mean and standard deviation normalize new ones.

  Attributes:
    scores: float64[at most size], the oldest first; the only state to save and restore.
  """

  def __init__(self, size: int = 1000, scale: float = 10.0, scores=()):
    """Starts empty, or with saved `scores`.

    Args:
      size: largest number of scores in the queue.
      scale: standard deviation of normalized scores.
    """
    self.size, self.scale = size, scale
    self.scores = np.asarray(scores, np.float64)[-size:]

  def normalize(self, scores):
    """Adds scores to the queue, and returns (score - mean) / std * scale over the queue.

    Args:
      scores: float[...]; those that are not finite are returned unchanged and not added.

    Returns:
      float32[...]; 0 if all scores in the queue are equal.
    """
    scores = np.asarray(scores, np.float64)
    finite = np.isfinite(scores)
    if not finite.any():
      return scores.astype(np.float32)
    self.scores = np.concatenate([self.scores, scores[finite]])[-self.size :]
    deviation = self.scores.std()
    if deviation <= 1e-12 * np.abs(self.scores).max():
      return np.where(finite, 0.0, scores).astype(np.float32)
    normalized = (scores - self.scores.mean()) / deviation * self.scale
    return np.where(finite, normalized, scores).astype(np.float32)
