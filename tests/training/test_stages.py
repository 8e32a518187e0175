"""Reward models and DPO as whole runs: resumed exactly, and the reference's numbers kept."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scripts import train_dpo, train_reward
from tests import sft_run, tiny_models
from vlalign_jax.errors import InputError
from vlalign_jax.training import reference

STEPS = 6
TIMING = "perf/"
SCRIPTS = {"reward": train_reward, "dpo": train_dpo}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, compile_cache):
  """A model, and records with two to four ranked answers."""
  directory = tmp_path_factory.mktemp("preferences")
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.ranked(sft_run.make_records(str(directory / "data"), 24))
  sft_run.write_json(directory / "data" / "train.json", records[:18])
  sft_run.write_json(directory / "data" / "eval.json", records[18:])
  return directory


def make_config(directory, stage: str, **overrides):
  data = directory / "data"
  settings = {
    "data.eval": str(data / "eval.json"),
    "batch_size": 6,
    "num_train_epochs": 2.0,
    "save_every": 2,
    "save_total_limit": 3,
    **overrides,
  }
  return sft_run.make_config(directory / "model", data / "train.json", stage, **settings)


def metrics_of(workdir) -> list[dict]:
  return [
    {key: value for key, value in line.items() if not key.startswith(TIMING)}
    for line in sft_run.read_metrics(workdir)
  ]


def params_of(workdir) -> dict[str, np.ndarray]:
  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(pathlib.Path(workdir, "checkpoints", str(STEPS), "params"))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


RUNS = {
  "reward": ("reward", {"reward.center_rewards_coefficient": 0.01, "grad_accumulation": 2}),
  "adapters": (
    "dpo",
    {"lora.rank": 2, "lora.dropout": 0.2, "train.vision": False, "train.projector": False},
  ),
  "cached": (
    "dpo",
    # Held-out rows, as few as packing leaves, do not divide into micro-batches.
    {
      "dpo.reference": "cache",
      "dpo.sft_weight": 0.5,
      "dpo.loss": "ipo",
      "grad_accumulation": 3,
    },
  ),
}


@pytest.fixture(scope="module")
def finished(directory, tmp_path_factory):
  """Name in RUNS -> (stage, config, run directory) of the finished run, which is made once."""

  @functools.cache
  def make(name: str):
    stage, overrides = RUNS[name]
    config = make_config(directory, stage, **overrides)
    workdir = tmp_path_factory.mktemp(name)
    SCRIPTS[stage].train_and_evaluate(config, str(workdir))
    return stage, config, workdir

  return make


@pytest.mark.parametrize(
  "name",
  [name if name == "reward" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS],
)
def test_a_run_goes_on_exactly_where_a_checkpoint_stands(name, finished, tmp_path):
  stage, config, done = finished(name)
  workdir = shutil.copytree(done, tmp_path / "run")
  for step in (4, STEPS):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  SCRIPTS[stage].train_and_evaluate(config, str(workdir))
  assert metrics_of(workdir) == metrics_of(done)
  found, expected = params_of(workdir), params_of(done)
  assert found.keys() == expected.keys()
  for path, leaf in found.items():
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_only_what_is_trained_is_in_the_checkpoint(name, finished):
  paths = params_of(finished(name)[2])
  if name == "adapters":
    assert all("lora_" in path for path in paths)
  else:
    assert ("score" in str(paths.keys())) == (name == "reward")
    assert not [path for path in paths if "lora_" in path]


def test_rewards_lie_between_their_extremes(finished):
  for line in metrics_of(finished("reward")[2]):
    assert line["min_reward"] < line["mean_reward"] < line["max_reward"]


def test_dpo_starts_at_the_reference(finished):
  first = metrics_of(finished("cached")[2])[0]
  assert first["step"] == 1
  assert abs(first["rewards/margins"]) < 1e-5


def test_the_kept_reference_gives_the_numbers_of_one_in_the_step(finished, tmp_path):
  _, config, workdir = finished("cached")
  config = config.copy_and_resolve_references()
  config.dpo.reference = "step"
  train_dpo.train_and_evaluate(config, str(tmp_path))
  for one, other in zip(metrics_of(workdir), metrics_of(tmp_path), strict=True):
    assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_kept_reference_of_other_data_is_refused(finished, tmp_path):
  _, config, workdir = finished("cached")
  other = tmp_path / "other"
  shutil.copytree(workdir / "reference", other / "reference")
  for key, value in (
    ("data.template", "llava"),
    ("data.image_aspect", "pad"),
    ("model.mmca", True),
    ("model.dtype", "bfloat16"),
  ):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match="train.npz: the reference's .* are of other data.*delete"):
      train_dpo.train_and_evaluate(changed, str(other))
  table = other / "reference" / "train.npz"
  whole = table.read_bytes()
  for damaged in (b"half", whole[: len(whole) // 2], whole[:-60] + b"0" * 60):
    table.write_bytes(damaged)
    with pytest.raises(InputError, match="train.npz: damaged .*; delete it"):
      train_dpo.train_and_evaluate(config, str(other))


def test_an_example_that_the_reference_could_not_see_is_not_taken_for_one_it_did():
  table = np.array([[-3.0, -4.0], [np.nan, np.nan]], np.float32)
  rows = {"examples": np.array([[0, 1]]), "answers": np.array([[[5, 9], [-1, -1]]])}
  found = reference.add_to_batch(table, rows)["reference"]
  np.testing.assert_array_equal(found, [[[-3, -4], [0, 0]]])
  rows["answers"][0, 1] = 5, 9  # its picture has been mended
  with pytest.raises(InputError, match="example 1 has no log-probability .* delete reference/"):
    reference.add_to_batch(table, rows)


def test_a_picture_that_the_reference_cannot_see(directory, tmp_path):
  """Bad records are counted there, too, before training begins."""
  config = make_config(directory, "dpo", **{"dpo.reference": "cache", "num_train_epochs": 1.0})
  records = json.loads((directory / "data" / "train.json").read_text())
  shutil.copytree(directory / "data", tmp_path / "data")
  first = next(record for record in records if record.get("image"))
  path = tmp_path / "data" / np.atleast_1d(first["image"])[0]
  path.write_bytes(path.read_bytes()[:100])
  config.data.train = str(tmp_path / "data" / "train.json")
  config.data.eval = ""
  with pytest.raises(InputError, match="cannot be decoded"):
    train_dpo.train_and_evaluate(config, str(tmp_path / "error"))
  config.data.on_bad_record = "skip"
  train_dpo.train_and_evaluate(config, str(tmp_path / "skip"))
  table = np.load(tmp_path / "skip" / "reference" / "train.npz")["log_probabilities"]
  assert 0 < np.isnan(table).all(axis=1).sum() < len(table)


def test_a_reward_model_is_not_taken_for_a_policy(finished, directory, tmp_path):
  workdir = finished("reward")[2]
  config = make_config(directory, "dpo", **{"model.init_from": str(workdir)})
  with pytest.raises(InputError, match="model.init_from=.* is a reward model.*name a policy"):
    train_dpo.train_and_evaluate(config, str(tmp_path / "dpo"))
