"""Where numbers go: metrics.jsonl, TensorBoard and a progress bar, from process 0 only."""

import json
import math
import os
import tempfile
import time

import jax
from etils import epath
from tensorboardX import SummaryWriter

from vlalign_jax import progress, storage
from vlalign_jax.runs import run_directory

# A bucket takes files as a whole: seconds between copies of the log while nothing is saved.
UPLOAD_EVERY = 60.0
# What stands beside the progress bar.
SHOWN = (
  "loss",
  "accuracy",
  "rewards/accuracies",
  "objective/scores",
  "objective/kl",
  "eval/loss",
  "eval/exact_match",
  "eval/accuracy",
  "eval/rewards/accuracies",
  "eval/objective/scores",
  "tokens_per_second",
)


class MetricLog:
  """Writes metrics as they come; what was logged before a crash and after `step` is replaced.

  If `workdir` is a URL, the files grow in a directory of this machine and are copied by `flush`.
  """

  def __init__(self, workdir: str, step: int, total_steps: int, lag: int = 0):
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._workdir = workdir
    self._copied = tempfile.TemporaryDirectory() if storage.is_url(workdir) else None
    self._directory = self._copied.name if self._copied else workdir
    path = os.path.join(self._directory, "metrics.jsonl")
    storage.write(path, run_directory.metrics_until(epath.Path(workdir) / "metrics.jsonl", step))
    self._held: dict[str, float] = {}
    self._held_step = 0
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
    self._board = SummaryWriter(self._directory, purge_step=step + 1 if step else None)
    self._uploaded = time.monotonic()
    self._bar = progress.make_bar(total_steps, step, lag)

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._writes:
      self._bar.advance(step - self._bar.n)

  def write(self, step: int, metrics: dict[str, float], more_follow: bool = False) -> None:
    """One line of metrics.jsonl and one point a curve; non-finite numbers become null.

    With `more_follow` the line waits for the next call, which must be for the same step.
    """
    if not self._writes:
      return
    metrics, self._held = self._held | metrics, {}
    if more_follow:
      self._held, self._held_step = metrics, step
      return
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    self._file.write(json.dumps({"step": step} | finite) + "\n")
    self._file.flush()
    for key, value in metrics.items():
      self._board.add_scalar(key, value, step)
    shown = {key: metrics[key] for key in SHOWN if key in metrics}
    if shown:
      self._bar.set_postfix(shown, refresh=False)
    if self._copied and time.monotonic() > self._uploaded + UPLOAD_EVERY:
      self.flush()

  def flush(self) -> None:
    """Brings all that was written to where it lasts."""
    if not self._writes:
      return
    if self._held:  # what was to follow never came
      self.write(self._held_step, {})
    if not self._copied:
      os.fsync(self._file.fileno())
      return
    self._board.flush()
    storage.upload(self._directory, self._workdir)
    self._uploaded = time.monotonic()

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._writes:
      self.flush()
      self._bar.close()
      self._board.close()
      self._file.close()
      if self._copied:
        self._copied.cleanup()


class Throughput:
  """Rates since the last call of `rates`."""

  def __init__(self):
    self._start, self._tokens, self._examples = time.perf_counter(), 0, 0

  def add(self, tokens: int, examples: int) -> None:
    """Counts work done."""
    self._tokens += tokens
    self._examples += examples

  def rates(self) -> dict[str, float]:
    """tokens_per_second (padding not counted) and examples_per_second; starts counting anew."""
    seconds = max(time.perf_counter() - self._start, 1e-9)
    rates = {
      "tokens_per_second": round(self._tokens / seconds, 1),
      "examples_per_second": round(self._examples / seconds, 3),
    }
    self.__init__()
    return rates
