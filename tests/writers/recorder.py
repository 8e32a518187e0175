"""A writer that keeps what it is given."""

import math


class Recorder:
  """Keeps numbers as `lines` of metrics.jsonl, and `tables` as (name, step, rows as dicts)."""

  shows_tables = True

  def __init__(self):
    self.lines, self.tables, self.closed = [], [], []

  def scalars(self, step, values):
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self.lines.append({"step": step} | finite)

  def table(self, name, step, columns, rows):
    self.tables.append((name, step, [dict(zip(columns, row, strict=True)) for row in rows]))

  def flush(self):
    pass

  def close(self, failed=False):
    self.closed.append(failed)
