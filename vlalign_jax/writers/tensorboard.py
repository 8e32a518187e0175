"""TensorBoard's files, next to metrics.jsonl: numbers only."""

import importlib
import os
import tempfile
import time

from vlalign_jax import storage


class TensorBoard:
  """Writes an event file into the run directory; TensorBoard drops older points after `step`.

  If the directory is a URL, the file is written to this machine and copied there by `flush`.
  tensorboardX's SummaryWriter is not used, as its `flush` does not wait for its own thread.

  Args:
    workdir: the run directory.
    step: that the run goes on from; 0: it starts, or starts again.
  """

  shows_tables = False

  def __init__(self, workdir: str, step: int):
    # Imported here: scripts that only read a config need not wait.
    files = importlib.import_module("tensorboardX.event_file_writer")
    self._events = importlib.import_module("tensorboardX.proto.event_pb2")
    self._scalar = importlib.import_module("tensorboardX.summary").scalar
    self._workdir = workdir
    self._copied = tempfile.TemporaryDirectory() if storage.is_url(workdir) else None
    directory = self._copied.name if self._copied else workdir
    self._file = files.EventsWriter(os.path.join(directory, "events"))
    start = self._events.SessionLog(status=self._events.SessionLog.START)
    self._write(step + 1 if step else 0, session_log=start)

  def _write(self, step: int, **content) -> None:
    event = self._events.Event(step=step, wall_time=time.time(), **content)
    self._file.write_event(event)

  def scalars(self, step, values):
    """Writes a point of each curve."""
    for key, value in values.items():
      self._write(step, summary=self._scalar(key, value))

  def table(self, name, step, columns, rows):
    """Does nothing, see `shows_tables`."""

  def flush(self):
    """Writes everything to the file, and copies it if the run directory is a URL."""
    self._file.flush()
    if self._copied:
      storage.upload(self._copied.name, self._workdir)

  def close(self, failed=False):
    """Writes everything and closes the file."""
    del failed
    self.flush()
    self._file.close()
    if self._copied:
      self._copied.cleanup()
