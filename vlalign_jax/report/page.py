"""report.html: runs of a stage next to each other, on a page that needs no other file."""

from collections.abc import Sequence

from vlalign_jax import html, stages
from vlalign_jax.prediction import settings
from vlalign_jax.report import curves, samples, tables
from vlalign_jax.report.directory import Run

TITLES = {"sft": "SFT", "reward": "Reward models", "dpo": "DPO", "ppo": "PPO"}

_STYLE = """
.charts { display: grid; gap: 1em;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23em), 1fr)); }
figure.chart { width: auto; min-width: 0; }
figure.chart svg { width: 100%; display: block; }
figure.chart text { font-size: 13px; }
figcaption { font-size: .9em; }
.grid { stroke: currentColor; stroke-opacity: .15; }
.legend { white-space: normal; }
.legend span { margin-right: 1.2em; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: .2em;
  margin-right: .4em; }
.scroll td.text { overflow-wrap: break-word; min-width: 5em; max-width: 24em; }
th { font-weight: 600; }
details { margin: 1em 0; } summary { cursor: pointer; }
"""


def page(runs: Sequence[Run]) -> str:
  """Returns the page.

  Args:
    runs: at least one; those of a stage are shown together, in the order that they have here.
  """
  color_of = curves.colors(runs)
  body = [html.scroll(html.table(("", "stage", "model", "data", "steps"), map(_summary, runs)))]
  for stage in (*stages.STAGES, settings.STAGE):
    group = [run for run in runs if run.stage == stage]
    if group:
      body += _predictions(group) if stage == settings.STAGE else _stage(stage, group, color_of)
  return html.page("Report", body, _STYLE)


def _summary(run: Run) -> tuple:
  config = run.config
  towers = (config.get("model.vision"), config.get("model.language"))
  model = config["model.init_from"] or " + ".join(filter(None, towers))
  data = config.get("data.train") or config["data.eval"]
  return run.name, run.stage, model, data, run.lines[-1]["step"] if run.lines else None


def _stage(stage: str, runs: list[Run], color_of: dict[str, str]) -> list[str]:
  shown = [part for run in runs for part in samples.sections(run)]
  return [
    f"<h2>{html.text(TITLES.get(stage, stage))}</h2>",
    curves.legend(runs, color_of),
    *curves.charts(stage, runs, color_of),
    "<h3>Held out</h3>",
    tables.held_out(runs),
    "<h3>Time and memory</h3>",
    tables.cost(runs),
    "<h3>Configuration</h3>",
    tables.config(runs),
    *(["<h3>Newest rollouts</h3>", *shown] if shown else []),
  ]


def _predictions(runs: list[Run]) -> list[str]:
  return [
    "<h2>Predictions</h2>",
    tables.numbers(runs),
    "<h3>Configuration</h3>",
    tables.config(runs),
    *(part for run in runs for part in samples.sections(run)),
  ]
