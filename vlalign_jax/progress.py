"""Progress bars whose time left leaves compilation out."""

import collections
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from tqdm import tqdm

# Answers of a batch come together: those that come within this many seconds belong to one batch.
TOGETHER = 0.02
# An interval of which more than this share was compilation says nothing of the pace.
_COMPILES = 0.05
_KEPT = 1000  # intervals


class _Compilation:
  """When this process was tracing or compiling, as JAX reports it; overlaps count once."""

  def __init__(self):
    self._spans, self._lock = collections.deque(maxlen=10_000), threading.Lock()
    jax.monitoring.register_event_duration_secs_listener(self._add)

  def _add(self, event: str, seconds: float, **_) -> None:
    if not event.startswith("/jax/core/compile/"):
      return
    with self._lock:
      end = time.perf_counter()
      start = end - seconds
      while self._spans and self._spans[-1][1] > start:
        start = min(start, self._spans.pop()[0])
      self._spans.append((start, end))

  def seconds(self, start: float, end: float) -> float:
    """Of the time between two readings of `time.perf_counter`."""
    total = 0.0
    with self._lock:
      for first, last in reversed(self._spans):
        if last <= start:
          break
        total += max(0.0, min(last, end) - max(first, start))
    return total


_compilation = _Compilation()


class Pace:
  """How fast a loop goes when it does not compile; its first interval, a start, is left out.

  Args:
    lag: how many steps late the loop reports them. While a step is compiled the devices finish
      those before it, which are then reported at once: so many intervals are left out.
    together: seconds; units that come faster belong to the ones before, see TOGETHER.
    clock: () -> seconds.
    compiling: (start, end) -> seconds of compilation between.
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
    self._intervals = collections.deque(maxlen=_KEPT)  # [seconds, units]
    self._units, self._compiled, self._left_out, self._counts = 0, 0.0, 1, False
    self._first: tuple[float, int, float] | None = None  # its end, units, compilation

  def add(self, units: int = 1) -> None:
    """Counts units that are done by now."""
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
    if compiled > _COMPILES * seconds:
      self._left_out = max(1, self._lag)
    self._counts = not self._left_out
    if self._counts:
      self._intervals.append([seconds - compiled, units])
    else:
      self._left_out -= 1

  def rate(self) -> float:
    """Returns units per second; 0 where nothing is known yet.

    Until an interval counts, it is that of all time but compilation and the first interval.
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
  """A progress bar whose rate is that of a Pace."""

  def __init__(self, *args, pace: Pace | None = None, **kwargs):
    self.pace = pace or Pace()
    super().__init__(*args, **kwargs)

  @property
  def format_dict(self):
    """What tqdm shows, with the rate of the pace; 0 is shown as "?"."""
    return super().format_dict | {"rate": self.pace.rate()}

  def advance(self, units: int = 1) -> None:
    """Moves the bar by units that are done."""
    if units:
      self.pace.add(units)
      self.update(units)


def make_bar(total: int, initial: int, lag: int = 0) -> Bar:
  """Returns the bar of a training run.

  Args:
    total: steps of the whole run.
    initial: those done before.
    lag: how many steps late they are reported.
  """
  # A log file wants a line now and then, not ten a second.
  often = 0.1 if sys.stderr.isatty() else 30.0
  pace = Pace(lag)
  return Bar(
    total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=often, pace=pace
  )


def shown(
  items: Iterable, name: str, total: int, initial: int = 0, unit: str = "answer"
) -> Iterator:
  """Yields items while a bar shows how far they are, if that takes more than five seconds.

  Args:
    items: what is gone through; answers come a batch at a time.
    name: left of the bar.
    total: how many there are, those done before included.
    initial: how many were done before.
    unit: of the items.
  """
  together = TOGETHER if unit == "answer" else 0.0
  pace = Pace(together=together)
  with Bar(desc=name, total=total, initial=initial, unit=unit, delay=5, pace=pace) as bar:
    for item in items:
      yield item
      bar.advance()
