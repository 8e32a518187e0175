"""Logs as a run does that dies, and then as the run that goes on from its checkpoint.

python -m tests.writers.logged_run WORKDIR WRITERS [crash]
"""

import os
import pathlib
import sys

from PIL import Image

from vlalign_jax import config as configs
from vlalign_jax.training.metrics import MetricLog
from vlalign_jax.writers import choose

CHECKPOINT, STEPS = 2, 4
COLUMNS = ("id", "picture", "answer", "score", "ended")


def values_of(step: int, sitting: int) -> dict[str, float]:
  """Returns the numbers of a step; NaN and a number of many digits among them."""
  values = {
    "loss": 1 / (step + sitting),
    "perf/tokens_per_second": 1000.0 * sitting,
    "bad_records": 0,
  }
  return values | ({"grad_norm": float("nan")} if step == 1 else {"grad_norm": 0.1 + step})


def rows(step: int) -> list[list]:
  """Returns two rows of a table, one without a picture and a score."""
  picture = Image.new("RGB", (4 + step, 3), "red")
  return [["a", picture, f"at {step}", 0.5, True], ["b", None, "none", None, False]]


def main(workdir: str, names: str, *crash: str) -> None:
  config = configs.shared()
  config.log.writers = names
  resumes = os.path.exists(os.path.join(workdir, "metrics.jsonl"))
  first = CHECKPOINT if resumes else 0
  with choose.opened(config, workdir, first, resumes) as writers:
    log = MetricLog(workdir, first, STEPS, writers=writers)
    for step in range(first + 1, STEPS + 1):
      log.write(step, values_of(step, 1 + resumes) | log.usage(), more_follow=step == STEPS)
    log.write(STEPS, {"eval/loss": 0.25})
    for writer in writers:
      writer.table("rollouts", STEPS, COLUMNS, rows(STEPS))
    log.flush()
    if crash:
      pathlib.Path(workdir, "crashed").touch()
      os._exit(1)
    log.close()


if __name__ == "__main__":
  main(*sys.argv[1:])
