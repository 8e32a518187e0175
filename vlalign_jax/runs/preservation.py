"""Which checkpoints stay: the newest, and the best by an evaluation metric."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

from etils import epath

from vlalign_jax.evaluation_metrics import HIGHER_IS_BETTER


@dataclasses.dataclass
class NewestAndBest:
  """An Orbax PreservationPolicy; a checkpoint that is both counts as both.

  Attributes:
    directory: of the checkpoints.
    newest: how many of the newest stay.
    best: how many of the best stay; those that were not evaluated are never among them.
    metric: what makes the best, one of `evaluation_metrics.HIGHER_IS_BETTER`.
  """

  directory: epath.Path
  newest: int
  best: int
  metric: str

  def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
    """Whether each of the checkpoints, ordered by step, stays."""
    del context
    stay = {info.step for info in checkpoints[-self.newest :]}
    if self.best:
      # Those of this process carry their metrics; the others have them on disk only.
      found = {
        info.step: info.metrics or metrics_of(self.directory / str(info.step))
        for info in checkpoints
      }
      stay |= set(ranked(found, self.metric)[: self.best])
    return [info.step in stay for info in checkpoints]


def metrics_of(checkpoint: epath.Path) -> dict[str, float]:
  """The evaluation metrics in a checkpoint's progress; none if it was not evaluated or is damaged.

  Damage is not told here but where the checkpoint is read: it must not stop a run that has others.
  """
  try:
    progress = json.loads((checkpoint / "progress" / "metadata").read_text())
    return {name: float(number) for name, number in progress["metrics"].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}


def ranked(metrics: Mapping[int, Mapping[str, float]], metric: str) -> list[int]:
  """The steps that have a metric, best first; of equals the newest, which was trained the longest.

  Args:
    metrics: step -> metric -> value; a value that is not finite counts as none.
    metric: one of `evaluation_metrics.HIGHER_IS_BETTER`.
  """
  sign = -1 if HIGHER_IS_BETTER[metric] else 1
  values = {
    step: sign * found[metric]
    for step, found in metrics.items()
    if math.isfinite(found.get(metric, math.nan))
  }
  return sorted(values, key=lambda step: (values[step], -step))
