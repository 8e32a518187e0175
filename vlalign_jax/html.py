"""Makes HTML pages that need no other file: text is escaped, pictures are embedded."""

import base64
import io
from collections.abc import Iterable
from html import escape

from vlalign_jax.data import images
from vlalign_jax.errors import InputError

THUMBNAIL = 240  # pixels of the longer side

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5em; }
h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { text-align: left; vertical-align: top; padding: .2em .9em .2em 0;
  border-bottom: 1px solid #e4e4e4; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
section { display: flex; gap: 1.2em; border-top: 1px solid #ccc; padding: 1em 0; }
section > div { flex: 1; min-width: 0; }
figure { margin: 0; flex: none; width: 240px; }
figure img { max-width: 100%; display: block; margin-bottom: .4em; }
p, td.text { white-space: pre-wrap; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
p { margin: 0 0 .5em; }
.label { color: #666; font-size: .85em; }
.bars { width: 16em; } .bars div { background: #5b7db1; height: .8em; }
.right { background: #e2f5e4; }
.best { font-weight: 600; }
mark { background: #fdf0b4; color: inherit; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
.scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #16181a; }
  th, td { border-color: #333; } section { border-color: #444; }
  .label { color: #999; } .right { background: #1d3a22; }
  mark { background: #4d431a; }
}
@media (max-width: 40em) {
  body { margin: 1em auto; }
  section { flex-direction: column; gap: .5em; }
  figure { width: auto; }
  .bars { width: 9em; }
}
"""


def page(title: str, body: Iterable[str], style: str = "") -> str:
  """Returns a complete document; `title` is plain text, `body` is HTML, `style` further CSS."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n'
    f"<title>{text(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
    f"<h1>{text(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
  )


def text(value) -> str:
  """Returns a value as text, escaped for HTML."""
  return escape(str(value), quote=True)


def table(head: Iterable[str], rows: Iterable[Iterable]) -> str:
  """Returns a table; numbers are aligned to the right, `None` is a dash."""
  lines = ["".join(f"<th>{text(name)}</th>" for name in head)]
  lines += ["".join(map(_cell, row)) for row in rows]
  return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def scroll(table: str) -> str:
  """Returns a table that scrolls by itself where it is wider than the page."""
  return f'<div class="scroll">{table}</div>'


def _cell(value) -> str:
  return f'<td class="text">{text(value)}</td>' if isinstance(value, str) else number_cell(value)


def number_cell(value: float | None) -> str:
  """Returns a table cell with a number, or a dash for None."""
  shown = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else value
  return f'<td class="number">{text(shown)}</td>'


def pictures(paths: Iterable[str]) -> str:
  """Returns the pictures of a record as thumbnails; an error replaces one that cannot be read."""
  shown = []
  for path in dict.fromkeys(paths):
    try:
      source = _thumbnail(path)
      shown.append(f'<img src="{source}" alt="{text(path)}" title="{text(path)}">')
    except InputError as error:
      shown.append(f'<p class="label">{text(error)}</p>')
  return f"<figure>{''.join(shown)}</figure>"


def _thumbnail(path: str) -> str:
  image = images.open_image(path)
  image.thumbnail((THUMBNAIL, THUMBNAIL))
  file = io.BytesIO()
  image.save(file, "JPEG", quality=80)
  return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
