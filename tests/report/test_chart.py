"""Tests charts: round ticks, gaps, and curves with many points."""

import re

import numpy as np
import pytest

from vlalign_jax.report import chart


@pytest.mark.parametrize(
  ("low", "high", "whole", "expected"),
  [
    (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (-0.13, 0.42, False, [0.0, 0.2, 0.4]),
    (1, 40, True, [10, 20, 30, 40]),
    (0, 3, True, [0, 1, 2, 3]),
    (2e-6, 2e-5, False, [5e-6, 1e-5, 1.5e-5, 2e-5]),
  ],
)
def test_ticks(low, high, whole, expected):
  np.testing.assert_allclose(chart.ticks(low, high, whole), expected, atol=1e-12)


def paths(drawn: str) -> list[str]:
  """Returns the paths of curves."""
  return re.findall(r'<path d="([^"]+)" fill="none"', drawn)


def test_a_curve_goes_from_corner_to_corner():
  drawn = chart.draw("loss", [chart.Curve("run", "red", [(0, 0.0), (10, 1.0)])])
  (path,) = paths(drawn)
  (x0, y0), (x1, y1) = (map(float, point.split()) for point in path[1:].split("L"))
  assert x0 == chart.LEFT
  assert x1 == chart.WIDTH - chart.RIGHT
  assert chart.TOP < y1 < y0 < chart.HEIGHT - chart.BOTTOM  # larger values are higher


def test_a_gap_divides_a_curve():
  points = [(1, 1.0), (2, 2.0), (3, None), (4, 1.0), (5, 3.0)]
  (path,) = paths(chart.draw("loss", [chart.Curve("run", "red", points)]))
  assert path.count("M") == 2
  assert path.count("L") == 2


def test_single_points_and_held_out_points_are_dots():
  drawn = chart.draw("loss", [chart.Curve("run, held out", "red", [(7, 0.125)], held_out=True)])
  assert drawn.count("<circle") == 1
  assert "<title>run, held out, step 7: 0.125</title>" in drawn
  assert "stroke-dasharray" in drawn
  assert chart.draw("x", [chart.Curve("a", "red", [(7, 2.0)])]).count("<circle") == 1
  two = chart.Curve("a", "red", [(7, 2.0), (8, 2.0)])
  assert "<circle" not in chart.draw("x", [two])


def test_long_curves_keep_their_peaks():
  points = [(step, 0.0) for step in range(10_000)]
  points[1234], points[7777], points[5000] = (1234, 9.0), (7777, -9.0), (5000, None)
  kept = chart.thin(points)
  assert len(kept) <= chart.MOST_POINTS + 2
  assert (1234, 9.0) in kept
  assert (7777, -9.0) in kept
  assert (5000, None) in kept
  assert [step for step, _ in kept] == sorted(step for step, _ in kept)
  assert chart.thin(points[:50]) == points[:50]
