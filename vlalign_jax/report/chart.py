"""A chart of curves over steps, as inline SVG that takes the width it is given."""

import dataclasses
import math
from collections.abc import Sequence

from vlalign_jax.html import text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 52, 10, 8, 24
MOST_POINTS = 400  # of a curve; longer ones keep the lowest and the highest of each part
_TICKS = 5


@dataclasses.dataclass(frozen=True)
class Curve:
  """A curve.

  Attributes:
    label: shown when the pointer rests on it.
    color: of CSS.
    points: (step, value), in the order of steps; None is a gap.
    held_out: whether it is dashed, with a dot for each point.
  """

  label: str
  color: str
  points: Sequence[tuple[int, float | None]]
  held_out: bool = False


def draw(title: str, curves: Sequence[Curve]) -> str:
  """Draws curves over each other.

  Args:
    title: what they show.
    curves: at least one has a value.
  """
  steps = [step for curve in curves for step, _ in curve.points]
  values = [value for curve in curves for _, value in curve.points if value is not None]
  across, along = (
    _Axis.over(steps, LEFT, WIDTH - RIGHT, whole=True),
    _Axis.over(values, HEIGHT - BOTTOM, TOP),
  )
  parts = [*_grid(across, along)]
  for curve in curves:
    parts += _curve(curve, across, along)
  return (
    f'<figure class="chart"><figcaption>{text(title)}</figcaption>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">'
    f"{''.join(parts)}</svg></figure>"
  )


@dataclasses.dataclass(frozen=True)
class _Axis:
  """Maps values from `low` to `high` to places from `start` to `end`."""

  low: float
  high: float
  start: float
  end: float
  ticks: list[float]

  @classmethod
  def over(cls, values: Sequence[float], start: float, end: float, whole: bool = False) -> "_Axis":
    """Returns an axis over values; `whole` ticks are whole numbers and the ends those of values."""
    low, high = min(values), max(values)
    if low == high:
      margin = 1.0 if whole else abs(low) * 0.1 or 1.0
      low, high = low - margin, high + margin
    elif not whole:
      margin = 0.04 * (high - low)
      low, high = low - margin, high + margin
    return cls(low, high, start, end, ticks(low, high, whole))

  def place(self, value: float) -> float:
    return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
  """Returns about five round numbers from low to high."""
  rough = (high - low) / _TICKS
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
  step = max(step, 1.0) if whole else step
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [number * step for number in range(first, last + 1)]


def thin(points: Sequence[tuple[int, float | None]], most: int = MOST_POINTS) -> list:
  """Returns about so many points: of each part of the curve its lowest, its highest and a gap."""
  if len(points) <= most:
    return list(points)
  size, kept = math.ceil(2 * len(points) / most), []
  for start in range(0, len(points), size):
    part = points[start : start + size]
    finite = [(value, step) for step, value in part if value is not None]
    gap = next((step for step, value in part if value is None), None)
    chosen: dict[int, float | None] = {} if gap is None else {gap: None}
    if finite:
      chosen |= {step: value for value, step in (min(finite), max(finite))}
    kept += sorted(chosen.items(), key=lambda point: point[0])
  return kept


def _grid(across: _Axis, along: _Axis):
  for value in along.ticks:
    y = along.place(value)
    yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>'
  for value in across.ticks:
    x = min(across.place(value), WIDTH - RIGHT - 6)
    yield f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_short(value)}</text>'


def _short(value: float) -> str:
  if value == 0:
    return "0"
  if abs(value) >= 10_000:
    return f"{value / 1000:.6g}k"
  return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _curve(curve: Curve, across: _Axis, along: _Axis):
  points, draws, path = thin(curve.points), "M", ""
  dots = []
  for step, value in points:
    if value is None:
      draws = "M"
      continue
    x, y = across.place(step), along.place(value)
    path += f"{draws}{x:.1f} {y:.1f}"
    draws = "L"
    if curve.held_out or len(points) == 1:
      dots.append(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.color}">'
        f"<title>{text(curve.label)}, step {step}: {value:.5g}</title></circle>"
      )
  dashes = ' stroke-dasharray="5 4"' if curve.held_out else ""
  yield (
    f'<path d="{path}" fill="none" stroke="{curve.color}" stroke-width="1.7"{dashes}>'
    f"<title>{text(curve.label)}</title></path>"
  )
  yield from dots
