"""TensorBoard's files, next to metrics.jsonl: numbers only."""

import tempfile

from vlalign_jax import storage


class TensorBoard:
  """Writes event files into the run directory; points after `step` are replaced.

  If the directory is a URL, the files are written to this machine and copied there by `flush`.
  """

  shows_tables = False

  def __init__(self, workdir: str, step: int):
    from tensorboardX import SummaryWriter  # imported here: scripts that only read a config wait

    self._workdir = workdir
    self._copied = tempfile.TemporaryDirectory() if storage.is_url(workdir) else None
    directory = self._copied.name if self._copied else workdir
    self._board = SummaryWriter(directory, purge_step=step + 1 if step else None)

  def scalars(self, step, values):
    """Writes a point of each curve."""
    for key, value in values.items():
      self._board.add_scalar(key, value, step)

  def table(self, name, step, columns, rows):
    """Does nothing, see `shows_tables`."""

  def flush(self):
    """Copies the files to the bucket, if the run directory is there."""
    if self._copied:
      self._board.flush()
      storage.upload(self._copied.name, self._workdir)

  def close(self, failed=False):
    """Writes everything and closes the file."""
    del failed
    self.flush()
    self._board.close()
    if self._copied:
      self._copied.cleanup()
