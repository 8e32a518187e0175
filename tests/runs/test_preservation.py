"""Which checkpoints stay, and which of them is the best."""

import os

import jax.numpy as jnp
import pytest

from vlalign_jax.errors import InputError
from vlalign_jax.optim.state import TrainState
from vlalign_jax.runs import checkpoints, preservation

LOSSES = {1: 4.0, 2: 1.5, 3: 3.0, 4: None, 5: 2.0, 6: 2.5}  # step -> eval/loss, if it was evaluated


def _save(manager, step, metrics):
  state = TrainState(jnp.int32(step), {"a": jnp.ones(3)}, (), jnp.int32(0), jnp.int32(0))
  checkpoints.save(manager, step, state, {"step": step, "metrics": metrics})


def _save_all(workdir, steps, **options):
  with checkpoints.open_checkpoints(str(workdir), **options) as manager:
    for step in steps:
      loss = LOSSES[step]
      _save(manager, step, {} if loss is None else {"eval/loss": loss, "eval/exact_match": -loss})


def _steps(workdir):
  return sorted(int(name) for name in os.listdir(workdir / "checkpoints"))


KEPT = {
  "newest only": ({"save_total_limit": 2}, [5, 6]),
  "newest and best": ({"save_total_limit": 2, "save_best_limit": 1}, [2, 5, 6]),
  "a best one is among the newest": ({"save_total_limit": 2, "save_best_limit": 2}, [2, 5, 6]),
  "the newest was not evaluated": ({"save_total_limit": 3, "save_best_limit": 1}, [2, 4, 5, 6]),
  "by another metric": (
    {"save_total_limit": 1, "save_best_limit": 3, "metric_for_best_model": "eval/exact_match"},
    [2, 5, 6],
  ),
  "more than there are": ({"save_total_limit": 1, "save_best_limit": 9}, [1, 2, 3, 5, 6]),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("restarts", [False, True])
def test_what_stays(tmp_path, name, restarts):
  """...whether the metrics are of this process or on disk."""
  options, expected = KEPT[name]
  for steps in ([1, 2, 3], [4], [5, 6]) if restarts else ([1, 2, 3, 4, 5, 6],):
    _save_all(tmp_path, steps, **options)
  assert _steps(tmp_path) == expected


def test_a_damaged_one_is_no_best_one(tmp_path):
  """...and does not stop the others from being saved."""
  _save_all(tmp_path, [1, 2, 3], save_total_limit=1, save_best_limit=1)
  (tmp_path / "checkpoints" / "2" / "progress" / "metadata").write_text("")
  _save_all(tmp_path, [4, 5, 6], save_total_limit=1, save_best_limit=1)
  assert _steps(tmp_path) == [5, 6]


def test_ranks():
  found = {
    1: {"eval/loss": 2.0, "eval/exact_match": 0.5},
    2: {"eval/loss": float("nan"), "eval/exact_match": 0.5},
    3: {},
    4: {"eval/loss": 1.0, "eval/exact_match": 0.25},
  }
  assert preservation.ranked(found, "eval/loss") == [4, 1]
  assert preservation.ranked(found, "eval/exact_match") == [2, 1, 4]  # of equals the newest


def test_a_checkpoint_is_named(tmp_path, monkeypatch):
  _save_all(tmp_path, [2, 3, 4], save_total_limit=3)
  steps = tmp_path / "checkpoints"
  named = {
    str(tmp_path): 4,
    f"{tmp_path}/": 4,
    f"{steps}/3": 3,
    f"{steps}/3/": 3,
    f"{steps}/best": 2,
  }
  for place, step in named.items():
    workdir, which = checkpoints.find_run(place)
    assert workdir == str(tmp_path)
    assert checkpoints.find_step(workdir, which, "eval/loss") == step
  monkeypatch.chdir(tmp_path)
  assert checkpoints.find_run("checkpoints/3") == (".", "3")
  for other in (str(steps), str(tmp_path.parent), f"{steps}/3/params", "nowhere"):
    assert checkpoints.find_run(other) is None


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
  _save_all(tmp_path, [4], save_total_limit=1)
  for which in ("7", "bset"):
    with pytest.raises(InputError, match=f"no finished checkpoint '{which}'; there are .4."):
      checkpoints.find_step(str(tmp_path), which, "eval/loss")
  with pytest.raises(InputError, match=r"none of the checkpoints \[4\] was saved with eval/loss"):
    checkpoints.find_step(str(tmp_path), "best", "eval/loss")
