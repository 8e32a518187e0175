"""Ranks a run's checkpoints by an evaluation metric, and decides which are kept as the best."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

from etils import epath


@dataclasses.dataclass
class BestEvaluated:
  """Keeps the `n` best of the evaluated checkpoints; it is an Orbax PreservationPolicy.

  Orbax's BestN also keeps checkpoints without metrics while there are at most n checkpoints, and
  Orbax fails to open checkpoints if a file of metrics is damaged.
  """

  directory: epath.Path  # of the checkpoints
  n: int
  metric: str  # such as eval/loss

  def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
    """Returns whether each of the checkpoints is kept."""
    del context
    # Orbax knows the metrics of what this process has saved; those of earlier ones are on disk.
    metrics = {c.step: c.metrics or read_metrics(self.directory / str(c.step)) for c in checkpoints}
    best = rank(metrics, self.metric)[: self.n]
    return [c.step in best for c in checkpoints]


def read_metrics(checkpoint: epath.Path) -> dict[str, float]:
  """Reads the evaluation metrics of a checkpoint; {} if it was not evaluated or is damaged.

  Restoring it reports the damage; here it must not stop a run that has other checkpoints.
  """
  try:
    progress = json.loads((checkpoint / "progress" / "metadata").read_text())
    return {name: float(number) for name, number in progress["metrics"].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}


def rank(metrics: Mapping[int, Mapping[str, float]], metric: str) -> list[int]:
  """Returns the steps with a finite value of `metric`, best first; of equals the newest first.

  Args:
    metrics: step -> name of a metric -> value.
    metric: such as eval/loss; of losses and perplexities the lowest is the best, else the highest.
  """
  sign = 1 if metric.endswith(("loss", "perplexity")) else -1
  values = {step: sign * numbers.get(metric, math.nan) for step, numbers in metrics.items()}
  finite = [step for step, value in values.items() if math.isfinite(value)]
  return sorted(finite, key=lambda step: (values[step], -step))
