"""Scores by the reward function, made while the devices sample other answers."""

from collections.abc import Callable, Sequence

import numpy as np

from vlalign_jax.data.records import Record
from vlalign_jax.sharding import hosts


class FunctionScores:
  """The scores of a rollout's answers, which come some rows at a time.

  Each host calls the function for its own rows only.
  """

  def __init__(
    self,
    function: Callable[[Record, str], float],
    read: Callable[[np.ndarray, np.ndarray], list[list[str]]],
    records: Sequence[Record | None],
    samples: int,
    mine: np.ndarray,
  ):
    """Makes scores of 0.

    Args:
      function: (record, answer) -> score.
      read: (int32[n, N, M] tokens, int32[n, N] lengths) -> texts.
      records: of each row; None for rows of padding.
      samples: N.
      mine: bool[B], the rows of this host.
    """
    self._function, self._read, self._records, self._mine = function, read, records, mine
    self._scores = np.zeros((len(records), samples), np.float64)
    self._waiting = mine.copy()  # rows that have no scores yet

  def add(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Scores answers that have no score yet.

    Args:
      rows: int[n] numbers of their rows.
      tokens: int32[n, N, M].
      lengths: int32[n, N]; 0: none was given.
    """
    new = self._waiting[rows]
    rows, tokens, lengths = rows[new], tokens[new], lengths[new]
    for row, texts, sizes in zip(rows, self._read(tokens, lengths), lengths, strict=True):
      record = self._records[row]
      for sample in np.flatnonzero(sizes):
        assert record is not None  # rows of padding have no answers
        self._scores[row, sample] = self._function(record, texts[sample])
    self._waiting[rows] = False

  def joined(self) -> np.ndarray:
    """Returns float64[B, N], the scores of the rows of all hosts."""
    return hosts.joined(self._scores, self._mine)
