"""A model with a SigLIP tower goes through every stage, and transformers computes its logits."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs import predict as predict_config
from scripts import export_hf, train_dpo, train_ppo, train_reward, train_sft
from tests import parity, sft_run, tiny_models
from tests.weights.round_trip import load_in_torch, our_logits, torch_logits
from vlalign_jax.prediction.predict import predict
from vlalign_jax.weights import names

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory, compile_cache):
  """Towers, records, and a run of SFT with adapters in both of them."""
  root = tmp_path_factory.mktemp("siglip")
  tiny_models.make_siglip(root / "vision", whole=True)
  tiny_models.make_llama(root / "language")
  records = sft_run.make_records(str(root / "data"), 10)
  sft_run.write_json(root / "data" / "train.json", records[:8])
  sft_run.write_json(root / "data" / "ranked.json", sft_run.ranked(records[:8]))
  sft_run.write_json(root / "data" / "eval.json", records[8:])
  return root


def train(root, script, stage: str, model, data: str = "train", **overrides) -> str:
  """Trains a stage in float32; returns its run directory."""
  settings = {
    "model.dtype": "float32",
    "train.vision": False,
    "train.projector": False,
    "lora.rank": 2,
    "lora.vision_rank": 2,
    "optim.warmup_ratio": 0.0,
    "optim.learning_rate": 1e-2,
    "max_steps": 2,
    **overrides,
  }
  config = sft_run.make_config(model, root / "data" / f"{data}.json", stage, **settings)
  script.train_and_evaluate(config, str(root / stage))
  return str(root / stage)


@pytest.fixture(scope="module")
def policy(root):
  towers = {"model.vision": str(root / "vision"), "model.language": str(root / "language")}
  features = {"model.vision_feature_select_strategy": "full", "train.projector": True}
  return train(root, train_sft, "sft", "", **towers, **features)


def test_sft_with_adapters_in_the_tower(root, policy, tmp_path):
  out = str(tmp_path / "out")
  export_hf.export_run(policy, out, None)
  opened, graphdef, params = parity.open_model(policy)
  model = load_in_torch(out)
  logits = our_logits(opened.config, graphdef, params)
  assert parity.relative_error(logits, torch_logits(model, opened.config)) < 1e-5
  before, after = (
    load_file(root / "vision" / "model.safetensors"),
    load_file(f"{out}/model.safetensors"),
  )
  before, after = ({names.canonical(n): x for n, x in t.items()} for t in (before, after))
  changed = {
    name
    for name, tensor in before.items()
    if name.startswith("vision.") and not torch.equal(tensor, after[name])
  }
  # The matrices of the two layers that are run.
  assert len(changed) == 12
  assert all(name.startswith("vision.encoder.layers.") for name in changed)


def test_other_stages_and_prediction(root, policy):
  reward = train(root, train_reward, "reward", policy, "ranked")
  dpo = train(root, train_dpo, "dpo", policy, "ranked")
  settings = {"ppo.reward_model": reward, "ppo.max_new_tokens": 4, "ppo.critic_warmup": 0}
  ppo = train(root, train_ppo, "ppo", dpo, **settings)
  for run in (reward, dpo, ppo):
    lines = sft_run.read_metrics(run)
    assert max(line["step"] for line in lines) == 2, run
    values = [x for line in lines for x in line.values() if isinstance(x, float)]
    assert np.isfinite(values).all(), run
  config = predict_config.get_config()
  config.model.update(init_from=ppo, dtype="float32")
  config.data.update(eval=str(root / "data" / "eval.json"), max_length=192)
  config.generation.max_new_tokens = 4
  lines, _ = predict(config, str(root / "predictions"))
  assert len(lines) == 2
  assert json.dumps(lines)
