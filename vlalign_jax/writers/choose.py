"""`log.writers`: which writers a run has, checked first, opened when it begins."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import jax

from vlalign_jax import storage
from vlalign_jax.config_checks import Config
from vlalign_jax.errors import InputError
from vlalign_jax.writers import identity, wandb_run
from vlalign_jax.writers.tensorboard import TensorBoard
from vlalign_jax.writers.trackio_run import TrackioRun
from vlalign_jax.writers.wandb_run import WandbRun
from vlalign_jax.writers.writer import Writer

TENSORBOARD, WANDB, TRACKIO = "tensorboard", "wandb", "trackio"
NAMES = (TENSORBOARD, WANDB, TRACKIO)
_OPTIONAL = (WANDB, TRACKIO)  # packages that are imported only if they are asked for


def names(log: Config) -> list[str]:
  """Returns the writers that a config's `log` group names.

  Raises:
    InputError: a name is unknown, or there twice.
  """
  found = [name.strip() for name in log.writers.split(",")] if log.writers.strip() else []
  for name in found:
    if name not in NAMES:
      raise InputError(
        f"config.log.writers has {name!r}; choose from {', '.join(NAMES)}, comma-separated, or "
        "leave it empty"
      )
  if len({*found}) < len(found):
    raise InputError(f"config.log.writers is {log.writers!r}; name each writer once")
  return found


def check(log: Config) -> None:
  """Checks that the writers of a config's `log` group can be opened.

  Raises:
    InputError: a name is unknown, a package is missing, or wandb has no key.
  """
  asked = names(log)
  for name in asked:
    if name in _OPTIONAL and importlib.util.find_spec(name) is None:
      raise InputError(
        f"config.log.writers has {name!r}, which is not installed: pip install {name}"
      )
  if WANDB in asked and jax.process_index() == 0:
    wandb_run.sign_in()


@contextlib.contextmanager
def opened(config: Config, workdir: str, step: int = 0, resumes: bool = False) -> Iterator[list]:
  """Yields the writers of a run, in process 0; other processes have none.

  Args:
    config: of the run.
    workdir: the run directory.
    step: that the run goes on from.
    resumes: whether the run was there before; it then goes on at its writers.

  Raises:
    InputError: a writer cannot be opened.
  """
  writers: list[Writer] = []
  asked = names(config.log) if jax.process_index() == 0 else []

  def close(writer: Writer, error_type, *_) -> None:
    writer.close(failed=error_type is not None)

  with contextlib.ExitStack() as stack:  # closes all, even if closing one fails
    for name in asked:
      writers.append(_open(name, config, workdir, step, resumes))
      stack.push(functools.partial(close, writers[-1]))
    yield writers


def _open(name: str, config: Config, workdir: str, step: int, resumes: bool) -> Writer:
  if name == TENSORBOARD:
    return TensorBoard(workdir, step)
  run_name = config.log.name or storage.absolute(workdir).rsplit("/", 1)[-1]
  run = config.log.project, run_name, identity.run_id(workdir, name, resumes)
  if name == WANDB:
    return WandbRun(*run, workdir, config.to_dict())
  return TrackioRun(*run, config.to_dict())
