"""Checkpoints that cannot be read: damaged ones are passed over, others stay and are named."""

import errno
import gc
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vlalign_jax.errors import InputError
from vlalign_jax.optim.state import TrainState
from vlalign_jax.runs import checkpoints, damage

pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.usefixtures("leftovers"),
]


@pytest.fixture
def leftovers():
  """Ends here the coroutines that Orbax leaves behind when a file cannot be read."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gc.collect()


def _state(step: int) -> TrainState:
  params = {"a": {"kernel": jnp.arange(5000.0) + step}}
  return TrainState(jnp.int32(step), params, {"mu": jnp.ones(3)}, jnp.int32(0), jnp.int32(0))


def _abstract() -> TrainState:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), _state(0)
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run directory with checkpoints 1 and 2."""
  directory = tmp_path_factory.mktemp("saved")
  with checkpoints.open_checkpoints(str(directory), 2) as manager:
    for step in (1, 2):
      checkpoints.save(manager, step, _state(step), {"step": step})
  return directory


@pytest.fixture
def run(saved, tmp_path):
  """A copy of it."""
  return shutil.copytree(saved, tmp_path / "run")


def _restore_newest(run):
  with checkpoints.open_checkpoints(str(run), 2) as manager:
    return checkpoints.restore_newest(manager, _abstract())


def _restore_params(run):
  leaf = _abstract().params["a"]["kernel"]
  step = checkpoints.find_step(str(run), checkpoints.NEWEST, "eval/loss")
  wanted = {"a/kernel": leaf, "b": leaf}
  placement = dict.fromkeys(wanted, leaf.sharding)
  return checkpoints.restore_params(str(run), step, wanted, placement)


def test_the_newest_is_read(run):
  state, progress = _restore_newest(run)
  jax.tree.map(np.testing.assert_array_equal, state, _state(2))
  assert progress == {"step": 2}
  params = _restore_params(run)
  assert list(params) == ["a/kernel"]
  np.testing.assert_array_equal(params["a/kernel"], np.arange(5000) + 2)


def _largest(directory):
  files = [path for path in directory.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


DAMAGES = {
  "array cut off": lambda step: os.truncate(_largest(step / "params"), 700),
  "array missing": lambda step: _largest(step / "params").unlink(),
  "metadata cut off": lambda step: os.truncate(step / "params" / "_METADATA", 7),
  "parameters missing": lambda step: shutil.rmtree(step / "params"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_used(run, caplog, name):
  place = run / "checkpoints" / "2"
  DAMAGES[name](place)
  with pytest.raises(InputError) as caught:
    _restore_params(run)
  assert str(caught.value).startswith(f"{place} cannot be read: ")
  assert str(caught.value).endswith("; restore it, or move it away to use the checkpoint before")
  assert "See full TensorStore details" not in str(caught.value)
  assert "\n" not in str(caught.value)
  _, progress = _restore_newest(run)
  assert progress == {"step": 1}
  assert f"{place} cannot be read: " in caplog.text


def _wrapped(error):
  outer = Exception("Encountered error while reading array index")
  outer.__cause__ = error
  return outer


FAILURES = {
  "rights": (PermissionError(errno.EACCES, "Permission denied", "x"), "may not be read"),
  "rights, TensorStore": (_wrapped(ValueError("PERMISSION_DENIED: x")), "may not be read"),
  "host memory": (_wrapped(MemoryError("cannot allocate")), "does not fit into memory"),
  "device memory": (
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes."),
    "does not fit into memory: RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.; use more",
  ),
  "network": (OSError(errno.ESTALE, "Stale file handle"), "repeat the command"),
  "network, TensorStore": (_wrapped(ValueError("UNAVAILABLE: try again")), "repeat the command"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_good_one_that_cannot_be_read_stays(run, monkeypatch, name):
  """...and an older one is not taken for it."""
  failure, message = FAILURES[name]

  def fail(*_, **__):
    raise failure

  monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
  for restore in (_restore_newest, _restore_params):
    with pytest.raises(InputError) as caught:
      restore(run)
    assert str(caught.value).startswith(f"{run / 'checkpoints' / '2'} ")
    assert message in str(caught.value)
  assert sorted(os.listdir(run / "checkpoints")) == ["1", "2"]


def test_a_failing_device_is_no_damage(run, monkeypatch):
  failure = jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

  def fail(*_, **__):
    raise failure

  monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    _restore_newest(run)
  assert caught.value is failure


def test_what_may_not_be_listed_is_no_damage(run, monkeypatch):
  """Orbax says that it is missing."""
  listdir = os.listdir

  def refuse(path="."):
    if os.path.basename(path) == "params":
      raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
    return listdir(path)

  monkeypatch.setattr(damage.os, "listdir", refuse)
  with pytest.raises(InputError, match="checkpoints/2 may not be read: .*params"):
    _restore_newest(run)


def test_all_are_damaged(run):
  for step in (1, 2):
    shutil.rmtree(run / "checkpoints" / str(step) / "params")
  with pytest.raises(InputError) as caught:
    _restore_newest(run)
  assert "none of the checkpoints [2, 1] can be read" in str(caught.value)
  assert "Restore one of them, or start in a new --workdir" in str(caught.value)
  assert sorted(os.listdir(run / "checkpoints")) == ["1", "2"]


def test_none_is_there(tmp_path):
  assert _restore_newest(tmp_path) is None
  with pytest.raises(InputError, match="no finished checkpoint under checkpoints/"):
    _restore_params(tmp_path)


def test_parameters_alone_are_read_without_the_optimizer(run):
  """...and without the progress, whatever became of them."""
  place = run / "checkpoints" / "2"
  for path in [*(place / "optimizer").rglob("*"), *(place / "progress").rglob("*")]:
    if path.is_file():
      path.unlink()
  np.testing.assert_array_equal(_restore_params(run)["a/kernel"], np.arange(5000) + 2)
  shutil.rmtree(place / "optimizer")
  shutil.rmtree(place / "progress")
  np.testing.assert_array_equal(_restore_params(run)["a/kernel"], np.arange(5000) + 2)


def test_what_another_process_cannot_read_is_passed_over_here_too(run, monkeypatch, caplog):
  """The other process, which is simulated, says of checkpoint 2 that it is damaged."""
  answers = iter([False, True, False, False])  # failed?, damaged? of checkpoint 2, then of 1
  monkeypatch.setattr(checkpoints, "_anywhere", lambda here: next(answers) or here)
  _, progress = _restore_newest(run)
  assert progress == {"step": 1}
  assert "checkpoints/2 cannot be read by another process" in caplog.text


def test_what_another_process_may_not_read_ends_this_one_too(run, monkeypatch):
  monkeypatch.setattr(checkpoints, "_anywhere", lambda here: True)
  with pytest.raises(InputError, match="checkpoints/2: another process cannot read it; see its"):
    _restore_newest(run)
