"""Writes metrics to metrics.jsonl, to the run's writers and a progress bar, from process 0 only."""

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence

import jax
from etils import epath

from vlalign_jax import progress, storage
from vlalign_jax.runs import run_directory
from vlalign_jax.writers.writer import Writer

# A bucket takes files as a whole: seconds between copies of the log while nothing is saved.
UPLOAD_EVERY = 60.0
# What the progress bar shows.
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
  "perf/tokens_per_second",
  "perf/mfu",
)


class MetricLog:
  """Writes metrics as they come; those that a crashed run logged after `step` are replaced.

  If `workdir` is a URL, the files are written to this machine and copied there by `flush`.

  Args:
    workdir: the run directory.
    step: that the run goes on from.
    total_steps: where it ends.
    lag: how many steps late metrics come.
    writers: are given the same numbers; whoever opened them closes them.
  """

  def __init__(
    self,
    workdir: str,
    step: int,
    total_steps: int,
    lag: int = 0,
    writers: Sequence[Writer] = (),
  ):
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._workdir = workdir
    self._copied = tempfile.TemporaryDirectory() if storage.is_url(workdir) else None
    self._directory = self._copied.name if self._copied else workdir
    path = os.path.join(self._directory, "metrics.jsonl")
    kept = run_directory.metrics_until(epath.Path(workdir) / "metrics.jsonl", step)
    storage.write(path, kept)
    self._start = time.monotonic() - _seconds(kept)
    self._waiting: dict[str, float] = {}
    self._waiting_step = 0
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
    self._writers = writers
    self._uploaded = time.monotonic()
    self._bar = progress.make_bar(total_steps, step, lag)

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._writes:
      self._bar.advance(step - self._bar.n)

  def usage(self) -> dict[str, float]:
    """Returns what the run has cost so far, in process 0.

    Returns:
      perf/seconds, the time in this loop, earlier parts of a resumed run included; where devices
      report it perf/peak_memory_gb, the most memory in use on one device since the process began.
    """
    if not self._writes:
      return {}
    peaks = [
      (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    known = [peak for peak in peaks if peak is not None]
    memory = {"perf/peak_memory_gb": round(max(known) / 1e9, 3)} if known else {}
    return {"perf/seconds": round(time.monotonic() - self._start, 1)} | memory

  def write(self, step: int, metrics: dict[str, float], more_follow: bool = False) -> None:
    """Writes one line of metrics.jsonl and one point of each curve; non-finite numbers become null.

    With `more_follow` the line waits for the next call, which must be for the same step.
    """
    if not self._writes:
      return
    metrics, self._waiting = self._waiting | metrics, {}
    if more_follow:
      self._waiting, self._waiting_step = metrics, step
      return
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    self._file.write(json.dumps({"step": step} | finite) + "\n")
    self._file.flush()
    for writer in self._writers:
      writer.scalars(step, metrics)
    shown = {key: metrics[key] for key in SHOWN if key in metrics}
    if shown:
      self._bar.set_postfix(shown, refresh=False)
    if self._copied and time.monotonic() > self._uploaded + UPLOAD_EVERY:
      self.flush()

  def flush(self) -> None:
    """Writes everything to the disk, or to the bucket."""
    if not self._writes:
      return
    if self._waiting:  # the rest of its line never came
      self.write(self._waiting_step, {})
    for writer in self._writers:
      writer.flush()
    if not self._copied:
      os.fsync(self._file.fileno())
      return
    storage.upload(self._directory, self._workdir)
    self._uploaded = time.monotonic()

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._writes:
      self.flush()
      self._bar.close()
      self._file.close()
      if self._copied:
        self._copied.cleanup()


def _seconds(lines: str) -> float:
  """Returns the newest perf/seconds of lines of metrics.jsonl, 0 if there is none."""
  for line in reversed(lines.splitlines()):
    if "perf/seconds" in (values := json.loads(line)):
      return values["perf/seconds"]
  return 0.0
