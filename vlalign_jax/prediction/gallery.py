"""gallery.html: images, prompts, answers, references and numbers."""

from collections.abc import Sequence

from vlalign_jax import html
from vlalign_jax.data.records import Record
from vlalign_jax.prediction.metrics import normalize_spaces

_VALUES = ("reward", "logprob", "num_tokens")


def gallery(
  config, lines: list[dict], records: tuple[Record, ...], metrics: dict[str, float | int]
) -> str:
  """Returns the page of a prediction, with its first `config.gallery` records.

  Args:
    config: of the prediction.
    lines: of predictions.jsonl, in order.
    records: the records of the lines.
    metrics: of metrics.json.
  """
  groups: dict[int, list[dict]] = {}
  for line in lines:
    groups.setdefault(line["record"], []).append(line)
  shown = [(number, groups[number]) for number in shown_records(config, lines)]
  body = [
    html.table(
      ("", ""), [("mode", config.mode), ("model", config.model.init_from), *metrics.items()]
    ),
    f'<p class="label">{len(shown)} of {len(groups)} records</p>',
  ]
  for number, answers in shown:
    body.append(section(records[number], answers))
  return html.page("Predictions", body)


def shown_records(config, lines: list[dict]) -> list[int]:
  """Returns the records that the page shows: the first `config.gallery` ones of the lines."""
  return [*dict.fromkeys(line["record"] for line in lines)][: config.gallery]


def section(record: Record, lines: list[dict], values: tuple[str, ...] = _VALUES) -> str:
  """Returns the part of a page that shows a record and its answers.

  Args:
    record: the record of the lines.
    lines: its answers, with the fields of `records.shown` and maybe a "reference".
    values: names of numbers that the lines may have.
  """
  return answers_section(record.where, record.image_files, lines, values)


def answers_section(
  where: str, image_files: Sequence[str], lines: list[dict], values: tuple[str, ...] = _VALUES
) -> str:
  """Returns the same from lines alone.

  Args:
    where: a name of the record.
    image_files: paths of its pictures.
    lines, values: as in `section`.
  """
  parts = [f'<p class="label">{html.text(where)}</p>']
  if system := lines[0].get("system"):
    parts.append(f'<p class="label">{html.text(system)}</p>')
  for human, gpt in lines[0].get("history", ()):
    parts += [f"<p>{html.text(human)}</p>", f"<p><em>{html.text(gpt)}</em></p>"]
  parts.append(f"<p>{html.text(lines[0]['prompt'])}</p>")
  reference = lines[0].get("reference")
  if reference is not None:
    parts.append(f'<p><span class="label">reference</span> {html.text(reference)}</p>')
  values = tuple(name for name in values if any(name in line for line in lines))
  head = "".join(f'<th class="number">{name}</th>' for name in values)
  rows = "".join(_row(line, values, reference) for line in lines)
  table = f"<table><tr><th>answer</th>{head}</tr>{rows}</table>"
  parts.append(html.scroll(table))
  return f"<section>{html.pictures(image_files)}<div>{''.join(parts)}</div></section>"


def _row(line: dict, values: tuple[str, ...], reference: str | None) -> str:
  answer, classes = line["answer"], ["text"]
  if line.get("best"):
    classes.append("best")
  texts = [None if text is None else normalize_spaces(text) for text in (answer, reference)]
  if None not in texts and texts[0] == texts[1]:
    classes.append("right")
  content = html.text(answer) if answer is not None else ""
  if "rank" in line:
    content = f'<span class="label">{line["rank"] + 1}.</span> {content}'
  if line.get("best"):
    content += ' <span class="label">best</span>'
  if "reason" in line:
    content += f' <span class="label">({html.text(line["reason"])})</span>'
  cells = "".join(html.number_cell(line.get(name)) for name in values)
  return f'<tr><td class="{" ".join(classes)}">{content}</td>{cells}</tr>'
