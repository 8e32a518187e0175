"""How well a reward model's scores agree with rankings: accuracy of pairs, and calibration."""

from collections.abc import Sequence

import numpy as np

BINS = 10


def evaluate(lines: list[dict], pairs: Sequence[tuple[dict, dict]]) -> dict:
  """Returns the numbers of reward.json.

  Args:
    lines: of mode `reward`; all have a reward.
    pairs: (better, worse) lines, at least one pair; see `metrics.ranked_pairs`.

  Returns:
    answers and records; `pair_numbers` of all pairs, and the same by_answers (the number of a
    record's answers in pairs) and by_distance (the difference of the two ranks); record_accuracy,
    the mean over records of the accuracy of their pairs; best_first, the share of records whose
    best answer scores higher than all others; score_mean and score_deviation; calibration, see
    `calibrate`.
  """
  differences = np.array([better["reward"] - worse["reward"] for better, worse in pairs])
  records, record = np.unique([better["record"] for better, _ in pairs], return_inverse=True)
  distance = np.array([worse["rank"] - better["rank"] for better, worse in pairs])
  counts = np.bincount(record)  # K (K - 1) / 2 pairs of K answers
  answers = np.round((1 + np.sqrt(1 + 8 * counts)) / 2).astype(int)
  correct = np.bincount(record, differences > 0)
  rank = np.array([better["rank"] for better, _ in pairs])
  best_rank = np.full(len(records), np.iinfo(int).max)
  np.minimum.at(best_rank, record, rank)
  has_best = rank == best_rank[record]
  first = np.bincount(record, has_best & (differences > 0)) == np.bincount(record, has_best)
  scores = np.array([line["reward"] for line in lines])
  return {
    "answers": len(lines),
    "records": len(records),
    **pair_numbers(differences),
    "by_answers": _by(answers[record], differences),
    "by_distance": _by(distance, differences),
    "record_accuracy": float(np.mean(correct / counts)),
    "best_first": float(np.mean(first)),
    "score_mean": float(scores.mean()),
    "score_deviation": float(scores.std()),
    "calibration": calibrate(differences),
  }


def pair_numbers(differences: np.ndarray) -> dict[str, float | int]:
  """Summarizes pairs by float[N], the score of each better answer minus that of the worse one.

  Returns:
    pairs, their number; accuracy, the share with a positive difference; accuracy_error, its
    standard error as if pairs were independent; ties, the share with difference 0; loss, the mean
    of -log sigmoid; margin, the mean difference.
  """
  accuracy = float(np.mean(differences > 0))
  return {
    "pairs": len(differences),
    "accuracy": accuracy,
    "accuracy_error": float(np.sqrt(accuracy * (1 - accuracy) / len(differences))),
    "ties": float(np.mean(differences == 0)),
    "loss": float(np.mean(np.logaddexp(0, -differences))),
    "margin": float(np.mean(differences)),
  }


def _by(groups: np.ndarray, differences: np.ndarray) -> dict[str, dict]:
  return {str(key): pair_numbers(differences[groups == key]) for key in np.unique(groups)}


def calibrate(differences: np.ndarray, bins: int = BINS) -> dict:
  """Compares the probabilities that scores predict with the observed shares.

  By Bradley-Terry, the answer that scores higher by d is the better one with probability
  sigmoid(d), from 0.5 to 1. This probability puts pairs into bins of equal width.

  Args:
    differences: float[N], see `pair_numbers`.
    bins: their number.

  Returns:
    error, the expected calibration error (Guo et al. 2017, equation 3): the mean over pairs of
    |predicted - observed| of their bin; bins, of those that have pairs: low, high, pairs, predicted
    (mean probability) and observed (share of pairs in which the answer that scores higher is the
    better one; ties count half).
  """
  predicted = 1 / (1 + np.exp(-np.abs(differences)))
  observed = np.where(differences == 0, 0.5, differences > 0)
  width = 0.5 / bins
  indices = np.minimum(((predicted - 0.5) / width).astype(int), bins - 1)
  groups, error = [], 0.0
  for index in np.unique(indices):
    inside = indices == index
    mean, share = float(predicted[inside].mean()), float(observed[inside].mean())
    error += inside.sum() / len(differences) * abs(mean - share)
    low = 0.5 + width * int(index)
    group = {"low": round(low, 6), "high": round(low + width, 6), "pairs": int(inside.sum())}
    groups.append(group | {"predicted": mean, "observed": share})
  return {"error": float(error), "bins": groups}
