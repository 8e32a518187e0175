"""A run at Weights & Biases: numbers, and tables with pictures."""

import os
from typing import Any

from PIL import Image

from vlalign_jax import storage
from vlalign_jax.errors import InputError

_HELP = "run `wandb login`, or set WANDB_MODE=offline"


def sign_in() -> None:
  """Asks wandb for its key, so that a missing one is noticed before anything is computed.

  Raises:
    InputError: there is none.
  """
  import wandb

  if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
    return
  try:
    wandb.login()
  except wandb.Error as error:
    raise InputError(f"config.log.writers: wandb cannot start ({error}); {_HELP}") from error


class WandbRun:
  """Logs to a run, which has the id `run_id` and goes on if it exists.

  The x axis is the metric `step`: wandb's own step only grows, and a resumed run repeats the steps
  after its checkpoint.

  Args:
    project, name: of the run.
    run_id: of the run.
    workdir: the run directory; wandb's files are there too, unless it is a URL or WANDB_DIR is set.
    config: dict of the run's config.

  Raises:
    InputError: wandb cannot start the run.
  """

  shows_tables = True

  def __init__(self, project: str, name: str, run_id: str, workdir: str, config: dict):
    import wandb

    self._wandb = wandb
    elsewhere = storage.is_url(workdir) or os.environ.get("WANDB_DIR")
    try:
      self._run = wandb.init(
        project=project,
        name=name,
        id=run_id,
        resume="allow",
        dir=None if elsewhere else workdir,
        config=config,
      )
    except wandb.Error as error:
      raise InputError(f"config.log.writers: wandb cannot start ({error}); {_HELP}") from error
    self._run.define_metric("*", step_metric="step")

  def scalars(self, step, values):
    """Logs numbers."""
    self._run.log({"step": step, **values})

  def table(self, name, step, columns, rows):
    """Logs a wandb.Table with pictures as wandb.Image."""
    data: Any = [[self._cell(cell) for cell in row] for row in rows]
    self._run.log({"step": step, name: self._wandb.Table(columns=list(columns), data=data)})

  def _cell(self, cell):
    return self._wandb.Image(cell) if isinstance(cell, Image.Image) else cell

  def flush(self):
    """Does nothing: wandb sends as it comes."""

  def close(self, failed=False):
    """Ends the run, which wandb shows as finished or failed."""
    self._run.finish(exit_code=1 if failed else 0)
