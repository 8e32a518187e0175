"""What a writer is: a place outside the run directory that shows numbers and tables."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from PIL import Image

# A cell of a table; None is empty.
Cell = str | int | float | bool | Image.Image | None


class Writer(Protocol):
  """Shows a run's numbers and tables; process 0 has the only one of a run.

  Attributes:
    shows_tables: whether `table` does anything; pictures are decoded only where it does.
  """

  shows_tables: bool

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the numbers of a line of metrics.jsonl; they may be NaN or infinite."""

  def table(
    self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
  ) -> None:
    """Writes a table; `rows` have a cell for each column."""

  def flush(self) -> None:
    """Brings everything to where it is kept, if that is not done as it comes."""

  def close(self, failed: bool = False) -> None:
    """Flushes and ends; `failed` says that the run ended with an error."""
