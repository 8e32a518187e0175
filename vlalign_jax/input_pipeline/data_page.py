"""data.html: what a run's data holds, ten examples as the model reads them, and all that is bad."""

from collections.abc import Sequence

import numpy as np

from vlalign_jax import html
from vlalign_jax.data.records import count_keys
from vlalign_jax.input_pipeline import check, examples, report

SHOWN = 10


def page(config, reports: Sequence[check.Report]) -> str:
  """Returns HTML of the reports of a config's data, with pictures inside."""
  body = []
  for checked in reports:
    body += _split(config, checked)
  return html.page("What is in the data", body)


def _split(config, checked: check.Report) -> list[str]:
  rows = [(path, total, bad) for path, (total, bad) in checked.files.items()]
  lines = [
    f"<h2>{html.text(checked.name)}</h2>",
    html.table(("file", "records", "bad"), rows),
    html.table(("", ""), _facts(config, checked)),
  ]
  if checked.unread:
    keys = f"Keys that nothing reads: {count_keys(checked.unread)}."
    lines.append(f'<p class="label">{html.text(keys)}</p>')
  if checked.problems:
    bad = "".join(f"<li>{html.text(problem)}</li>" for problem in checked.problems)
    lines.append(f"<h3>Bad: {len(checked.problems):,}</h3><ul>{bad}</ul>")
  lengths = checked.lengths[checked.lengths > 0]
  if len(lengths):
    lines += ["<h3>Tokens of a record</h3>", _bars(lengths)]
  if checked.sizes:
    sides = np.array([max(size) for size in checked.sizes.values()])
    lines += ["<h3>Longer side of a picture, in pixels</h3>", _bars(sides)]
  usable = np.flatnonzero(checked.lengths > 0)
  if len(usable):
    # Spread over the files, as their beginnings may be alike.
    shown = usable[np.unique(np.linspace(0, len(usable) - 1, SHOWN).astype(int))]
    lines.append(
      '<h3>Examples</h3><p class="label"><mark>Marked</mark> is what the model learns to say.</p>'
    )
    lines += [examples.section(checked.load, checked.load(int(number))) for number in shown]
  return lines


def _facts(config, checked: check.Report) -> list[tuple[str, object]]:
  tokens = int(checked.lengths.sum())
  learned = sum(record.learned for record in checked.measured)
  skipped = sum(not record.tokens and not record.problem for record in checked.measured)
  facts: list[tuple[str, object]] = [
    ("turns", sum(len(record.turns) for record in checked.records)),
    ("pictures", checked.images),
    ("records without a picture", sum(not record.images for record in checked.records)),
    ("records with a system text of their own", sum(bool(r.system) for r in checked.records)),
    ("records that do not fit data.max_length", skipped),
    ("tokens", tokens),
    ("tokens that are learned", f"{learned / tokens:.1%}" if tokens else None),
  ]
  packing = check.packing(config, checked)
  if packing:
    facts.append(("tokens of packed rows that are used", f"{packing['packing_efficiency']:.1%}"))
  return facts


def _bars(values: np.ndarray) -> str:
  counted = report.count_bins(values)
  most = max(count for *_, count in counted)
  rows = "".join(
    f'<tr><td class="number">{start:,} - {end:,}</td><td class="number">{count:,}</td>'
    f'<td class="bars"><div style="width: {100 * count / most:.1f}%"></div></td></tr>'
    for start, end, count in counted
  )
  return f"<table>{rows}</table>"
