"""Where numbers go: metrics.jsonl, TensorBoard and a progress bar, from process 0 only."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from vlalign_jax.training import run_directory


class MetricLog:
  """Writes metrics as they come; what was logged before a crash and after `step` is replaced."""

  def __init__(self, workdir: str, step: int, total_steps: int):
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    path = os.path.join(workdir, "metrics.jsonl")
    run_directory.truncate_metrics(path, step)
    self._held: dict[str, float] = {}
    self._held_step = 0
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
    self._board = SummaryWriter(workdir, purge_step=step + 1 if step else None)
    # A log file wants a line now and then, not ten a second.
    often = 0.1 if sys.stderr.isatty() else 30.0
    self._bar = tqdm(
      total=total_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=often
    )

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._writes:
      self._bar.update(step - self._bar.n)

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
    shown = {
      key: metrics[key]
      for key in ("loss", "eval/loss", "eval/exact_match", "tokens_per_second")
      if key in metrics
    }
    if shown:
      self._bar.set_postfix(shown, refresh=False)

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._writes:
      if self._held:  # what was to follow never came
        self.write(self._held_step, {})
      self._bar.close()
      self._board.close()
      self._file.close()


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


def evaluation(sums: Iterable[dict]) -> dict[str, float]:
  """What evaluation reports, from the sums of its batches.

  Args:
    sums: dicts as `losses.sft.evaluation` returns, one a batch; on the devices.

  Returns:
    loss (mean per learnt token), perplexity, token_accuracy, exact_match, examples.
  """
  # Fetched once at the end, so that the devices go on; float32 could not count 17 million tokens.
  parts = jax.device_get(list(sums))
  total = {key: sum(float(part[key]) for part in parts) for key in parts[0]}
  loss = total["loss"] / total["tokens"]
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "token_accuracy": total["correct_tokens"] / total["tokens"],
    "exact_match": total["exact_examples"] / total["examples"],
    "examples": total["examples"],
  }
