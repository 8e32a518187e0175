"""A run of Trackio: numbers, and tables with pictures, in TRACKIO_DIR or a Space."""

import importlib

from PIL import Image

from vlalign_jax.errors import InputError


class TrackioRun:
  """Logs to a run, which goes on if one of this name exists.

  Trackio knows runs by their names alone, so the id is a part of it.

  Args:
    project, name: of the run.
    run_id: of the run.
    config: dict of the run's config.

  Raises:
    InputError: Trackio cannot start the run.
  """

  shows_tables = True

  def __init__(self, project: str, name: str, run_id: str, config: dict):
    self._trackio = importlib.import_module("trackio")
    try:
      self._run = self._trackio.init(
        project=project, name=f"{name}-{run_id}", resume="allow", config=config, embed=False
      )
    except Exception as error:  # of the Hub, of a server, or a name that is not allowed
      reason = " ".join(str(error).split())
      raise InputError(
        f"config.log.writers: trackio cannot start ({reason}); correct config.log.project, or "
        "TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, which choose where it logs"
      ) from error

  def scalars(self, step, values):
    """Logs numbers."""
    self._run.log(dict(values), step=step)

  def table(self, name, step, columns, rows):
    """Logs a trackio.Table with pictures as trackio.Image."""
    rows = [[self._cell(cell) for cell in row] for row in rows]
    table = self._trackio.Table(columns=list(columns), data=rows)
    self._run.log({name: table}, step=step)

  def _cell(self, cell):
    return self._trackio.Image(cell) if isinstance(cell, Image.Image) else cell

  def flush(self):
    """Does nothing: a thread of Trackio's writes."""

  def close(self, failed=False):
    """Writes everything and ends the run."""
    del failed
    self._run.finish()
