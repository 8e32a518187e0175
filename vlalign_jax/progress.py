"""Shows progress bars whose remaining time leaves out compilation."""

import collections
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from tqdm import tqdm

# Answers that come within this many seconds of each other are of one batch.
TOGETHER = 0.02
# An interval that was compilation for more than this share does not count for the rate.
_MAX_COMPILATION = 0.05
_MAX_INTERVALS = 1000  # that are kept


class _Compilation:
  """Records when this process was tracing or compiling, as JAX reports it; overlaps count once."""

  def __init__(self):
    self._spans, self._lock = collections.deque(maxlen=10_000), threading.Lock()
    jax.monitoring.register_event_duration_secs_listener(self._add)

  def _add(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    if not event.startswith("/jax/core/compile/"):
      return
    with self._lock:
      end = time.perf_counter()
      start = end - duration_secs
      while self._spans and self._spans[-1][1] > start:
        start = min(start, self._spans.pop()[0])
      self._spans.append((start, end))

  def seconds(self, start: float, end: float) -> float:
    """Returns the seconds of compilation between two readings of `time.perf_counter`."""
    total = 0.0
    with self._lock:
      for first, last in reversed(self._spans):
        if last <= start:
          break
        total += max(0.0, min(last, end) - max(first, start))
    return total


_compilation = _Compilation()


class Pace:
  """Measures the rate of a loop without compilation and without its first interval, the startup.

  Args:
    lag: how many steps late the loop reports them. While one step compiles, the devices finish the
      `lag` steps before it, which are then reported at once: these intervals are left out.
    together: seconds; units that come faster belong to the interval before, see TOGETHER.
    clock: () -> seconds.
    compiling: (start, end) -> seconds of compilation between them.
  """

  def __init__(
    self,
    lag: int = 0,
    together: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    compiling: Callable[[float, float], float] = _compilation.seconds,
  ):
    self._lag, self._together, self._clock, self._compiling = lag, together, clock, compiling
    self._start = self._last = clock()
    self._intervals = collections.deque(maxlen=_MAX_INTERVALS)  # [seconds, units]
    # _skip: how many of the next intervals are left out; _counts: whether the last one was not.
    self._units, self._compiled, self._skip, self._counts = 0, 0.0, 1, False
    self._first: tuple[float, int, float] | None = None  # end, units, compilation of the first

  def add(self, units: int = 1) -> None:
    """Counts units that are done now."""
    now = self._clock()
    seconds = now - self._last
    compiled = min(self._compiling(self._last, now), seconds)
    self._last, self._units, self._compiled = now, self._units + units, self._compiled + compiled
    if self._units == units:  # the first
      self._first = now, units, compiled
    elif seconds < self._together:
      if self._counts:
        self._intervals[-1][0] += seconds
        self._intervals[-1][1] += units
      return
    if compiled > _MAX_COMPILATION * seconds:
      self._skip = max(1, self._lag)
    self._counts = not self._skip
    if self._counts:
      self._intervals.append([seconds - compiled, units])
    else:
      self._skip -= 1

  def rate(self) -> float:
    """Returns units per second; 0 while it is not known.

    Until an interval counts, it is the rate of all time except compilation and the first interval.
    """
    seconds = sum(interval[0] for interval in self._intervals)
    units = sum(interval[1] for interval in self._intervals)
    if not units:
      start, before, compiled = self._start, 0, 0.0
      if self._first and self._units > self._first[1] and not self._together:
        start, before, compiled = self._first
      seconds = self._last - start - (self._compiled - compiled)
      units = self._units - before
    return units / seconds if seconds > 0 else 0.0


class Bar(tqdm):
  """Shows a progress bar with the rate of a Pace."""

  def __init__(self, *args, pace: Pace | None = None, **kwargs):
    self.pace = pace or Pace()
    super().__init__(*args, **kwargs)

  @property
  def format_dict(self):
    """Returns what tqdm shows, with the rate of the pace; tqdm shows 0 as "?"."""
    return {**super().format_dict, "rate": self.pace.rate()}

  def advance(self, units: int = 1) -> None:
    """Moves the bar by units that are done."""
    if units:
      self.pace.add(units)
      self.update(units)


def make_bar(total: int, initial: int, lag: int = 0) -> Bar:
  """Returns the bar of a training run.

  Args:
    total: all steps of the run.
    initial: steps that were done before.
    lag: how many steps late they are reported.
  """
  # A terminal is updated ten times a second; a log file gets a line in 30 seconds.
  interval, pace = 0.1 if sys.stderr.isatty() else 30.0, Pace(lag)
  return Bar(
    total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=interval, pace=pace
  )


def shown(
  items: Iterable, name: str, total: int, initial: int = 0, unit: str = "answer"
) -> Iterator:
  """Yields items and counts them on a bar, which appears after five seconds.

  Args:
    items: iterated over; answers come a batch at a time.
    name: shown left of the bar.
    total: number of items, including those done before.
    initial: number of items done before.
    unit: what an item is called.
  """
  together = TOGETHER if unit == "answer" else 0.0
  pace = Pace(together=together)
  with Bar(desc=name, total=total, initial=initial, unit=unit, delay=5, pace=pace) as bar:
    for item in items:
      yield item
      bar.advance()
