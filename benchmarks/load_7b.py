"""Loading a LLaVA-1.5 7B directory of random bfloat16 weights, next to safetensors.

  python -m benchmarks.load_7b --directory=/tmp/llava7b [--layers=32]

Makes the directory (14.1 GB with 32 layers; fewer layers make a smaller one), if it is not there,
and two records in it for scripts/predict.py. Then two fresh processes load it: `load_params` as
prediction does, and safetensors, every tensor into memory. Prints seconds, CPU seconds (user and
system) of loading, and the peak of resident memory, libraries included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 2 * 10**9


def make(directory: str, layers: int) -> None:
  """Writes the directory: configs, tokenizer, processor, shards with their index, two records."""
  import torch
  import transformers
  from PIL import Image

  from tests import tiny_models

  os.makedirs(directory)
  tokenizer = tiny_models.make_tokenizer()
  text = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": layers,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
  }
  vision = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
  }
  config = transformers.LlavaConfig(
    vision_config=tiny_models.vision_config(**vision),
    text_config=tiny_models.text_config(tokenizer, **text),
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    architectures=["LlavaForConditionalGeneration"],
    dtype="bfloat16",
  )
  with torch.device("meta"):
    shapes = transformers.LlavaForConditionalGeneration(config).state_dict()
  config.save_pretrained(directory)
  tokenizer.save_pretrained(directory)
  tiny_models.save_image_processor(directory, vision["image_size"])
  _write_shards(
    directory, {tiny_models.rename(n, "old"): tuple(t.shape) for n, t in shapes.items()}
  )
  Image.new("RGB", (336, 336), "red").save(os.path.join(directory, "red.png"))
  record = {
    "image": "red.png",
    "conversations": [
      {"from": "human", "value": "<image>\nWhat is in the image?"},
      {"from": "gpt", "value": "A cat."},
    ],
  }
  with open(os.path.join(directory, "records.json"), "w", encoding="utf-8") as file:
    json.dump([record | {"id": str(number)} for number in range(2)], file)


def _write_shards(directory: str, shapes: dict[str, tuple[int, ...]]) -> None:
  values = np.random.default_rng(0).normal(size=2**22).astype(np.float32)
  groups, size = [[]], 0
  for name, shape in shapes.items():
    if size > SHARD_BYTES:
      groups, size = [*groups, []], 0
    groups[-1].append(name)
    size += 2 * int(np.prod(shape))
  index = {}
  for number, group in enumerate(groups):
    file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
    tensors = {}
    for name in group:
      shape = shapes[name]
      scale = 0.02 if len(shape) > 1 else 1.0
      tensors[name] = np.resize((values * scale).astype(ml_dtypes.bfloat16), shape)
    save_file(tensors, os.path.join(directory, file), metadata={"format": "pt"})
    index |= dict.fromkeys(group, file)
  total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
  with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
    json.dump({"metadata": {"total_size": total}, "weight_map": index}, file)


def _ours(directory: str):
  import jax

  from vlalign_jax import config as configs
  from vlalign_jax.prediction import models
  from vlalign_jax.sharding import mesh as meshes
  from vlalign_jax.weights import source

  group = configs.shared().model
  group.init_from = directory
  opened = source.open_source(group)
  mesh = meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  return lambda: jax.block_until_ready(models.load_model(opened, "bfloat16", mesh))


def _safetensors(directory: str):
  import safetensors

  def load():
    found = {}
    for file in sorted(os.listdir(directory)):
      if file.endswith(".safetensors"):
        with safetensors.safe_open(os.path.join(directory, file), "numpy") as opened:
          for name in opened.keys():  # noqa: SIM118 (not a dict)
            found[name] = opened.get_tensor(name)
    return found

  return load


LOADERS = {"vlalign_jax": _ours, "safetensors": _safetensors}


def measure(directory: str, which: str) -> None:
  """Loads the directory and prints what it took."""
  load = LOADERS[which](directory)
  before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
  held = load()
  seconds = time.perf_counter() - start
  after = resource.getrusage(resource.RUSAGE_SELF)
  del held
  user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
  peak = after.ru_maxrss * 1024 / 1e9
  print(f"| {which} | {seconds:.1f} | {user:.1f} + {system:.1f} | {peak:.2f} |", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--directory", required=True)
  parser.add_argument("--layers", type=int, default=32)
  parser.add_argument("--only", choices=LOADERS, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.only:
    measure(arguments.directory, arguments.only)
    return
  if not os.path.isdir(arguments.directory):
    make(arguments.directory, arguments.layers)
  print(
    "| loader | seconds | CPU seconds, user + system | peak GB |\n|---|---|---|---|", flush=True
  )
  for which in LOADERS:
    command = [sys.executable, "-m", "benchmarks.load_7b", f"--directory={arguments.directory}"]
    subprocess.run([*command, f"--only={which}"], check=True)


if __name__ == "__main__":
  main()
