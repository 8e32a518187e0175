"""Traces of a few steps, for xprof or Perfetto."""

import os
import tempfile

import jax
from absl import logging

from vlalign_jax import storage

# The steps before it are compiled, and fill the queues.
FIRST = 4


class Trace:
  """Traces steps of this process, from the fourth on, into the run directory's `profile`.

  Args:
    workdir: the run directory; if it is a URL, traces stay on this machine.
    first: the step that the run goes on from.
    steps: how many are traced; 0: none.
  """

  def __init__(self, workdir: str, first: int, steps: int):
    self._begins, self._ends = first + FIRST, first + FIRST + steps
    self._steps, self._runs = steps, False
    self._workdir = workdir

  def before(self, step: int) -> None:
    """Starts the trace if this is its first step."""
    if not self._steps or step != self._begins or jax.process_index():
      return
    local = tempfile.mkdtemp() if storage.is_url(self._workdir) else self._workdir
    self._directory = os.path.join(local, "profile")
    jax.profiler.start_trace(self._directory)
    self._runs = True

  def after(self, step: int, state) -> None:
    """Waits for the last step of the trace, and writes it."""
    if self._runs and step >= self._ends - 1:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes the trace if it still runs."""
    if self._runs:
      jax.profiler.stop_trace()
      self._runs = False
      logging.info(
        "a trace of %d steps is in %s: open it with xprof, or its *.trace.json.gz in Perfetto",
        *(self._steps, self._directory),
      )
