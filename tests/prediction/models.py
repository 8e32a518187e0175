"""A tiny policy and a tiny reward model beside each other, in torch and as directories."""

import json
import os

import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints

REWARD_ARCHITECTURE = "ForSequenceClassification"


def make_policy(directory: str, **options):
  """As `checkpoints.make_llava`."""
  return checkpoints.make_llava(directory, **options)


def make_reward_model(directory: str, seed: int = 5):
  """(torch model whose language head does not count, torch float32[D] score weights)."""
  model = checkpoints.make_llava(directory, seed=seed)
  path = os.path.join(directory, "model.safetensors")
  tensors = {name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}
  generator = torch.Generator().manual_seed(seed)
  kernel = torch.randn(model.config.text_config.hidden_size, generator=generator)
  tensors["score.weight"] = kernel[None]
  save_file(tensors, path, metadata={"format": "pt"})
  config = os.path.join(directory, "config.json")
  with open(config, encoding="utf-8") as file:
    content = json.load(file)
  with open(config, "w", encoding="utf-8") as file:
    json.dump(content | {"architectures": [REWARD_ARCHITECTURE]}, file)
  return model, kernel
