"""log.json: under which names the writers know a run, so that a resumed run goes on there."""

import json
import uuid

from etils import epath

from vlalign_jax import storage
from vlalign_jax.errors import InputError

FILE = "log.json"


def run_id(workdir: str, writer: str, resumes: bool) -> str:
  """Returns the id of the run at a writer; a new one is random and stored in the directory.

  Args:
    workdir: the run directory.
    writer: name of the writer.
    resumes: whether the run goes on. One that starts again is a new run for its writers.

  Raises:
    InputError: the file is damaged.
  """
  path = epath.Path(workdir) / FILE
  known = {}
  if path.exists():
    try:
      known = json.loads(path.read_text())
      if not isinstance(known, dict):
        raise ValueError("not an object")
    except ValueError as error:
      raise InputError(
        f"{path} cannot be read as JSON ({error}); delete it, and the writers start a new run"
      ) from error
  if resumes and writer in known:
    return known[writer]
  known[writer] = uuid.uuid4().hex[:8]
  storage.write(str(path), json.dumps(known, indent=2) + "\n")
  return known[writer]
