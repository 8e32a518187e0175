"""Plots as inline SVG: a histogram of several sets, and a calibration curve."""

from collections.abc import Sequence

import numpy as np

from vlalign_jax.html import text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 240, 48, 30, 22
COLORS = ("#2b7a5d", "#c0504d", "#5b7db1")


def histogram(sets: dict[str, Sequence[float]], bins: int = 30) -> str:
  """Draws the share of each set that falls into each of `bins` equal parts of their range.

  Args:
    sets: name -> values; at least one set has values.
    bins: their number.
  """
  values = np.concatenate([np.asarray(values, float) for values in sets.values()])
  low, high = float(values.min()), float(values.max())
  if low == high:
    low, high = low - 0.5, high + 0.5
  edges = np.linspace(low, high, bins + 1)
  shares = {
    name: np.histogram(values, edges)[0] / len(values)
    for name, values in sets.items()
    if len(values)
  }
  most = max(share.max() for share in shares.values())
  parts = _axes((low, high), (0, most), "{:.3g}")
  step = (WIDTH - LEFT) / bins
  for (name, share), color, number in zip(shares.items(), COLORS, range(len(shares)), strict=False):
    for index, value in enumerate(share):
      height = value / most * (HEIGHT - BOTTOM - TOP)
      parts.append(
        f'<rect x="{LEFT + index * step:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
        f'width="{step:.1f}" height="{height:.1f}" fill="{color}" fill-opacity="0.55"/>'
      )
    x = LEFT + 10 + 130 * number
    parts.append(f'<rect x="{x}" y="4" width="10" height="10" fill="{color}"/>')
    parts.append(f'<text x="{x + 15}" y="13">{text(name)}</text>')
  return _svg(parts)


def calibration(bins: Sequence[dict]) -> str:
  """Draws observed against predicted, a dot for each of the bins of `reward_accuracy.calibrate`."""
  parts = _axes((0.5, 1.0), (0.0, 1.0), "{:.2g}")
  (x1, y1), (x2, y2) = _position(0.5, 0.5), _position(1.0, 1.0)
  parts.append(
    f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='currentColor' "
    "stroke-opacity='0.4' stroke-dasharray='4 4'/>"
  )
  most = max(group["pairs"] for group in bins)
  for group in bins:
    x, y = _position(group["predicted"], group["observed"])
    radius = 3 + 7 * (group["pairs"] / most) ** 0.5
    title = "predicted {predicted:.3f}, observed {observed:.3f}, {pairs} pairs".format(**group)
    parts.append(
      f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{COLORS[0]}" fill-opacity="0.7">'
      f"<title>{title}</title></circle>"
    )
  return _svg(parts)


def _position(predicted: float, observed: float) -> tuple[float, float]:
  x = LEFT + (predicted - 0.5) / 0.5 * (WIDTH - LEFT)
  return x, HEIGHT - BOTTOM - observed * (HEIGHT - BOTTOM - TOP)


def _axes(xs: tuple[float, float], ys: tuple[float, float], form: str) -> list[str]:
  base, parts = HEIGHT - BOTTOM, []
  for share in np.linspace(0, 1, 6):
    x, y = LEFT + share * (WIDTH - LEFT), base - share * (base - TOP)
    anchor = "end" if share == 1 else "middle"
    x_label, y_label = (form.format(low + share * (high - low)) for low, high in (xs, ys))
    parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="{anchor}">{x_label}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_label}</text>')
    parts.append(
      f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}" stroke="currentColor" '
      'stroke-opacity="0.15"/>'
    )
  return parts


def _svg(parts: list[str]) -> str:
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
    f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
  )
