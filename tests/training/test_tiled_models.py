"""Models whose pictures are several tiles go through every stage, resume exactly and split."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers

from configs import predict as predict_config
from scripts import export_hf, train_dpo, train_ppo, train_reward, train_sft
from tests import parity, sft_run, tiled_models
from tests.process_group import cpu_devices
from tests.weights.round_trip import load_in_torch
from vlalign_jax import trees
from vlalign_jax.prediction.predict import predict

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6
TIMING = "perf/"


@pytest.fixture(
  scope="module", params=[name for name in tiled_models.MODELS if name not in tiled_models.VARIANTS]
)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def root(name, tmp_path_factory, compile_cache):
  """A model and records with pictures of many sizes."""
  root = tmp_path_factory.mktemp(name)
  tiled_models.make(name, root / "model")
  records = sft_run.make_records(str(root / "data"), 22)
  sft_run.write_json(root / "data" / "train.json", records[:18])
  sft_run.write_json(root / "data" / "ranked.json", sft_run.ranked(records[:18]))
  sft_run.write_json(root / "data" / "eval.json", records[18:])
  return root


def make_config(root, stage: str, model, data: str = "train", **overrides):
  settings = {
    "model.dtype": "float32",
    "data.template": tiled_models.TEMPLATE,
    "data.max_length": 512,
    "train.vision": True,
    "optim.warmup_ratio": 0.0,
    "optim.learning_rate": 1e-2,
    "save_every": 2,
    "save_total_limit": 9,
    "max_steps": STEPS,
    **overrides,
  }
  return sft_run.make_config(model, root / "data" / f"{data}.json", stage, **settings)


def train(root, script, stage: str, model, *data, **overrides) -> str:
  workdir = str(root / stage)
  script.train_and_evaluate(make_config(root, stage, model, *data, **overrides), workdir)
  return workdir


@pytest.fixture(scope="module")
def policy(root):
  return train(root, train_sft, "sft", root / "model")


def metrics_of(run) -> list[dict]:
  return [
    {key: value for key, value in line.items() if not key.startswith(TIMING)}
    for line in sft_run.read_metrics(run)
  ]


def params_of(run) -> dict[str, np.ndarray]:
  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(pathlib.Path(run, "checkpoints", str(STEPS), "params"))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_an_export_of_a_run_is_what_was_trained(root, name, policy, tmp_path):
  losses = [line["loss"] for line in metrics_of(policy)]
  assert losses[-1] < losses[0]
  export_hf.export_run(policy, str(tmp_path / "out"), None)
  opened, graphdef, params = parity.open_model(policy)
  trained = load_in_torch(str(tmp_path / "out"), transformers.AutoModelForImageTextToText)
  processor = tiled_models.open_processor(name, str(tmp_path / "out"))
  model = tiled_models.Tiled(name, f"{root}/model", trained, processor, opened, graphdef, params)
  example = model.encoded(tiled_models.records(model)[2])
  logits = parity.logits(graphdef, params, model.rows([[example]]))[0, : len(example.tokens)]
  assert parity.relative_error(logits, model.torch_logits(example).detach()) < 1e-5


def test_a_resumed_run_has_the_same_bits(root, policy, tmp_path):
  resumed = tmp_path / "resumed"
  shutil.copytree(policy, resumed)
  for step in (4, STEPS):
    shutil.rmtree(resumed / "checkpoints" / str(step))
  config = make_config(root, "sft", root / "model")
  train_sft.train_and_evaluate(config, str(resumed))
  assert metrics_of(resumed) == metrics_of(policy)
  expected, found = params_of(policy), params_of(resumed)
  assert expected.keys() == found.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_a_run_over_eight_devices_has_the_same_losses(root, policy, tmp_path):
  settings = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "mesh.zero_stage": 3}
  config = make_config(root, "sft", root / "model", **settings)
  done = subprocess.run(
    [sys.executable, *sft_run.command_line(config, str(tmp_path / "split"))],
    env=os.environ | cpu_devices(8),
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
  for one, split in zip(metrics_of(policy), metrics_of(tmp_path / "split"), strict=True):
    assert split["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_sizes_of_pictures_add_no_compilation(root, tmp_path, caplog):
  config = make_config(root, "sft", root / "model", **{"data.pack": True, "max_steps": 12})
  with jax.log_compiles(), caplog.at_level("WARNING"):
    train_sft.train_and_evaluate(config, str(tmp_path / "run"))
  steps = re.findall(r"Finished XLA compilation of jit\((\w*)\)", caplog.text)
  assert 1 <= steps.count("train_step") <= 3, set(steps)


def test_other_stages_and_prediction(root, policy):
  reward = train(root, train_reward, "reward", policy, "ranked")
  adapters = {"lora.rank": 2, "lora.vision_rank": 2, "train.vision": False}
  dpo = train(root, train_dpo, "dpo", policy, "ranked", **adapters)
  settings = {"ppo.reward_model": reward, "ppo.max_new_tokens": 4, "ppo.critic_warmup": 0}
  ppo = train(root, train_ppo, "ppo", dpo, **settings, max_steps=2)
  for run in (reward, dpo, ppo):
    lines = metrics_of(run)
    assert max(line["step"] for line in lines) == (2 if run == ppo else STEPS), run
    values = [x for line in lines for x in line.values() if isinstance(x, float)]
    assert np.isfinite(values).all(), run
  export_hf.export_run(reward, str(root / "scorer"), None)
  scorer, _, params = parity.open_model(root / "scorer")
  assert (scorer.config.head, scorer.layout) == ("score", parity.open_model(reward)[0].layout)
  trained = trees.flatten(parity.open_model(reward)[2])
  for path, value in trees.flatten(params).items():
    np.testing.assert_array_equal(value, trained[path], err_msg=path)
  config = predict_config.get_config()
  config.model.update(init_from=ppo, dtype="float32")
  config.data.update(eval=str(root / "data" / "eval.json"), max_length=512)
  config.generation.max_new_tokens = 4
  lines, _ = predict(config, str(root / "predictions"))
  assert len(lines) == 4
  assert all(line["answer"] is not None for line in lines)
