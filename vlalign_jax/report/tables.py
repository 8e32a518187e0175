"""Tables of a report: what runs were given, what they reached, what it took."""

import statistics
from collections.abc import Iterable, Sequence

from vlalign_jax import html
from vlalign_jax.report.directory import Run
from vlalign_jax.runs import preservation, run_directory

# Shown first, and even if they have their defaults; not if they are empty, None or 0.
_MAIN = (
  *("mode", "model.init_from", "model.vision", "model.language", "reward_model"),
  *("ppo.reward_model", "ppo.reward_function", "data.train", "data.eval", "batch_size"),
  *("max_steps", "num_train_epochs", "optim.learning_rate", "lora.rank", "seed"),
)
# Change nothing that is learned or answered; the stage is in the heading.
_QUIET = {*run_directory.HARMLESS, "gallery", "stage"}


def config(runs: Sequence[Run]) -> str:
  """Returns a table of keys: the main ones, and those that a run sets; differences are marked."""
  keys = [key for key in _MAIN if any(run.config.get(key) for run in runs)]
  for key in sorted({key for run in runs for key in run.config} - {*keys}):
    changed = any(run.config.get(key) != run.defaults.get(key) for run in runs)
    if changed and key not in _QUIET:
      keys.append(key)
  rows = []
  for key in keys:
    values = [run.config.get(key) for run in runs]
    differs = any(value != values[0] for value in values)
    cells = "".join(f'<td class="text">{_mark(_shown(value), differs)}</td>' for value in values)
    rows.append(f"<tr><th>{html.text(key)}</th>{cells}</tr>")
  head = "".join(f"<th>{html.text(run.name)}</th>" for run in runs)
  table = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
  note = '<p class="label">marked: where runs differ</p>' if len(runs) > 1 else ""
  return html.scroll(table) + note


def _shown(value) -> str:
  if value is None or value == "":
    return "-"
  return str(value).lower() if isinstance(value, bool) else str(value)


def _mark(value: str, differs: bool) -> str:
  return f"<mark>{html.text(value)}</mark>" if differs else html.text(value)


def held_out(runs: Sequence[Run]) -> str:
  """Returns a table of held-out metrics: the last ones, and those of the best evaluation."""
  evaluated = [(run, run.evaluations()) for run in runs]
  evaluated = [(run, found) for run, found in evaluated if found]
  if not evaluated:
    return '<p class="label">nothing was evaluated (data.eval, data.eval_fraction)</p>'
  names = dict.fromkeys(name for _, found in evaluated for one in found.values() for name in one)
  chosen = [metric for run, _ in evaluated if (metric := _metric(run)) in names]
  names = [*dict.fromkeys([*chosen, *names])]
  columns, head = [], [""]
  for run, found in evaluated:
    ranked = preservation.rank(found, _metric(run))
    steps = {"last": max(found)} | ({"best": ranked[0]} if ranked else {})
    for kind, step in steps.items():
      head.append(f"{run.name}: {kind}, step {step}")
      columns.append(found[step])
  rows = [(name.removeprefix("eval/"), *(one.get(name) for one in columns)) for name in names]
  notes = {f"{run.name} by {_metric(run)}" for run, _ in evaluated}
  return html.scroll(html.table(head, rows)) + (
    f'<p class="label">best: {html.text(", ".join(sorted(notes)))}</p>'
  )


def _metric(run: Run) -> str:
  return run.config["metric_for_best_model"]


def cost(runs: Sequence[Run]) -> str:
  """Returns a table of steps, throughput, time and memory, of what the runs have recorded."""
  head = ("", "steps", "tokens per second", "examples per second", "time", "peak memory, GB")
  rows = []
  for run in runs:
    rates = [_values(run, f"perf/{unit}_per_second") for unit in ("tokens", "examples")]
    seconds, memory = _values(run, "perf/seconds"), _values(run, "perf/peak_memory_gb")
    rows.append(
      (
        run.name,
        max(line["step"] for line in run.lines),
        round(statistics.median(rates[0])) if rates[0] else None,
        statistics.median(rates[1]) if rates[1] else None,
        _unbroken(duration(seconds[-1])) if seconds else "-",
        max(memory, default=None),
      )
    )
  return html.scroll(html.table(head, rows)) + (
    '<p class="label">medians of logged steps; time in the loop, compilation and evaluation '
    "included; memory where the device reports it</p>"
  )


def duration(seconds: float) -> str:
  """Returns a time such as `3 h 05 min`, `4 min 12 s` or `42 s`."""
  whole = round(seconds)
  hours, minutes = whole // 3600, whole // 60 % 60
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def _unbroken(shown: str) -> str:
  return shown.replace(" ", "\u00a0")


def _values(run: Run, key: str) -> list[float]:
  return [line[key] for line in run.lines if line.get(key) is not None]


def numbers(runs: Iterable[Run]) -> str:
  """Returns a table of predictions' metrics."""
  runs = [*runs]
  names = dict.fromkeys(name for run in runs for name in run.numbers)
  rows = [(name, *(run.numbers.get(name) for run in runs)) for name in names]
  return html.scroll(html.table(("", *(run.name for run in runs)), rows))
