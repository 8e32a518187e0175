"""Tests that the time left contains neither compilation nor the steps before a resume."""

import io

import pytest

from vlalign_jax import progress


class Clock:
  """Simulates time, and compilation during it."""

  def __init__(self):
    self.now, self.spans = 100.0, []

  def __call__(self) -> float:
    return self.now

  def compile(self, seconds: float) -> None:
    self.spans.append((self.now, self.now + seconds))
    self.now += seconds

  def compiling(self, start: float, end: float) -> float:
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in self.spans)

  def pace(self, **options) -> progress.Pace:
    return progress.Pace(clock=self, compiling=self.compiling, **options)


def run(pace: progress.Pace, clock: Clock, compiles: dict, steps: int, seconds: float, lag: int):
  """Simulates a loop whose steps are dispatched at once and reported `lag` steps late."""
  free, ends = clock.now, []  # when the devices have done all that was dispatched
  for step in range(1, steps + 1):
    clock.compile(compiles.get(step, 0.0))
    free = max(free, clock.now) + seconds
    ends.append(free)
    if step > lag:
      clock.now = max(clock.now, ends[step - lag - 1])
      pace.add()


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize(
  "compiles",
  [{}, {1: 40.0}, {1: 40.0, 4: 30.0}, {1: 40.0, 2: 40.0, 3: 40.0}, {1: 40.0, 5: 9.0, 8: 20.0}],
)
def test_time_of_a_step_is_right_within_a_third_after_ten(lag, compiles):
  clock = Clock()
  pace = clock.pace(lag=lag)
  clock.now += 15.0  # data workers start
  run(pace, clock, compiles, 10, 2.0, lag)
  assert 1 / pace.rate() == pytest.approx(2.0, rel=1 / 3)


def test_a_batch_of_answers_comes_together():
  clock = Clock()
  pace = clock.pace(together=progress.TOGETHER)
  clock.compile(60.0)
  for _ in range(3):
    clock.now += 8.0
    for _ in range(16):
      pace.add()
      clock.now += 0.001
  assert 1 / pace.rate() == pytest.approx(0.5, rel=0.05)


def test_where_every_interval_compiles_the_rest_of_the_time_counts():
  clock = Clock()
  pace = clock.pace()
  assert pace.rate() == 0.0
  for _ in range(4):
    clock.compile(10.0)
    clock.now += 3.0
    pace.add()
  assert 1 / pace.rate() == pytest.approx(3.0)


@pytest.mark.parametrize("initial", [0, 500])
def test_the_bar_shows_the_time_left(initial):
  clock, shown = Clock(), io.StringIO()
  pace = clock.pace()
  bar = progress.Bar(
    total=initial + 100, initial=initial, unit="step", pace=pace, file=shown, mininterval=0
  )
  assert "?" in str(bar)
  clock.compile(300.0)
  for _ in range(10):
    clock.now += 2.0
    bar.advance()
  assert "<03:00," in str(bar)  # 90 steps of 2 s
  bar.close()


def test_jax_reports_what_it_compiles():
  import jax

  start = progress.time.perf_counter()
  jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(7))
  end = progress.time.perf_counter()
  assert 0 < progress._compilation.seconds(start, end) <= end - start
