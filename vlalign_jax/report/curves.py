"""Which charts a stage has: its main metrics, and all others folded away."""

from collections.abc import Sequence

from vlalign_jax import html, stages
from vlalign_jax.report import chart
from vlalign_jax.report.directory import Run

COLORS = (
  "#2b7a5d",
  "#c0504d",
  "#5b7db1",
  "#b8860b",
  "#8e5ea2",
  "#2c9aa8",
  "#d1679a",
  "#808080",
)
# Shown first where they are, after the loss and what checkpoints are ranked by.
_MAIN = ("objective/kl", "perplexity", "grad_norm", "learning_rate")
_NO_CURVES = ("step", "perf/seconds", "perf/compilations")
_EVAL = "eval/"


def colors(runs: Sequence[Run]) -> dict[str, str]:
  """Returns name of a run -> its color in all charts; beyond eight runs hues are computed."""
  more = (f"hsl({137.5 * number % 360:.0f} 55% 50%)" for number in range(len(runs)))
  chosen = (COLORS[n] if n < len(COLORS) else color for n, color in enumerate(more))
  return dict(zip((run.name for run in runs), chosen, strict=True))


def legend(runs: Sequence[Run], color_of: dict[str, str]) -> str:
  """Returns the names of runs with their colors, and what is dashed."""
  names = [
    f'<span><i style="background:{color_of[run.name]}"></i>{html.text(run.name)}</span>'
    for run in runs
  ]
  held_out = any(run.evaluations() for run in runs)
  kinds = (
    '<span class="label">training: solid; held out: dashed; over steps</span>' if held_out else ""
  )
  return f'<p class="legend">{"".join(names)}{kinds}</p>'


def charts(stage: str, runs: Sequence[Run], color_of: dict[str, str]) -> list[str]:
  """Returns HTML of the charts of the runs of a stage.

  Args:
    stage: of all of them.
    runs: at least one.
    color_of: from `colors`.
  """
  drawn, constant, never = {}, {}, []
  for name in _names(runs):
    curves = _curves(name, runs, color_of)
    values = {value for curve in curves for _, value in curve.points if value is not None}
    if len(values) > 1:
      drawn[name] = chart.draw(name, curves)
    elif values:
      constant[name] = values.pop()
    else:
      never.append(name)
  first = [metric.removeprefix(_EVAL) for metric in stages.STAGES[stage].metrics]
  main = [name for name in dict.fromkeys(("loss", *first, *_MAIN)) if name in drawn]
  others = [name for name in sorted(drawn) if name not in main]
  body = [f'<div class="charts">{"".join(drawn[name] for name in main)}</div>']
  if others:
    grid = f'<div class="charts">{"".join(drawn[name] for name in others)}</div>'
    body.append(f"<details><summary>{len(others)} more charts</summary>{grid}</details>")
  if constant:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(constant.items()))
    body.append(f'<p class="label">one value only: {html.text(shown)}</p>')
  if never:
    body.append(f'<p class="label">never finite: {html.text(", ".join(sorted(never)))}</p>')
  return body


def _names(runs: Sequence[Run]) -> list[str]:
  """Returns the metrics of runs; held-out ones have the name of those of training."""
  keys = dict.fromkeys(key for run in runs for line in run.lines for key in line)
  return [*dict.fromkeys(key.removeprefix(_EVAL) for key in keys if key not in _NO_CURVES)]


def _curves(name: str, runs: Sequence[Run], color_of: dict[str, str]) -> list[chart.Curve]:
  found = []
  for run in runs:
    for key, kind in ((name, "training"), (f"{_EVAL}{name}", "held out")):
      points = [(line["step"], line[key]) for line in run.lines if key in line]
      if points:
        label = f"{run.name}, {kind}"
        found.append(chart.Curve(label, color_of[run.name], points, kind == "held out"))
  return found
