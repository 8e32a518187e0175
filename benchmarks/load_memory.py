"""Peak host memory and time of loading a Hugging Face checkpoint.

  python benchmarks/load_memory.py [--gigabytes=2]

Writes a LLaVA-layout checkpoint of random float32 weights in a temporary directory, loads it in a
fresh process and prints the process's peak resident memory over the checkpoint's size, imports
included. On the CPU the parameters themselves are host memory, so 1.0 is the least there is.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from vlalign_jax import trees
from vlalign_jax.models import clip, llama, projector, rope, vlm
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.weights import load, names, source, tensors

WIDTH, MLP, VOCABULARY = 2048, 5504, 32064


def model_config(gigabytes: float) -> vlm.ModelConfig:
  """LLaMA-like proportions; as many layers as make up the size."""
  per_layer = 4 * (4 * WIDTH**2 + 3 * WIDTH * MLP)
  layers = max(1, round((gigabytes * 1e9 - 2 * 4 * WIDTH * VOCABULARY) / per_layer))
  return vlm.ModelConfig(
    vision=clip.VisionConfig(256, 1024, 2, 4, 56, 14, "quick_gelu", 1e-5, (2,), False),
    projector=projector.ProjectorConfig("mlp", 256, WIDTH),
    language=llama.LanguageConfig(
      VOCABULARY, WIDTH, MLP, layers, 16, 16, 128, 1e-6, rope.RopeConfig()
    ),
    image_token_id=32000,
    image_mean=(0.5,) * 3,
    image_std=(0.5,) * 3,
  )


def write_checkpoint(config: vlm.ModelConfig, directory: str) -> int:
  """Writes model.safetensors, header and zeros to be filled by random bytes; returns its size."""
  import json

  _, abstract = vlm.abstract_params(config)
  shapes = {path: leaf.shape for path, leaf in trees.flatten(abstract).items()}
  header, offset = {}, 0
  for name in names.names_of(config):
    shape = shapes[name.path]
    for layer in range(shape[0]) if name.stacked else (0,):
      tensor = names.tensor_shape(name.kind, shape[1:] if name.stacked else shape)
      size = 4 * int(np.prod(tensor))
      header[names.exported(name.tensor.format(layer), config)] = {
        "dtype": "F32",
        "shape": tensor,
        "data_offsets": [offset, offset + size],
      }
      offset += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  block = np.random.default_rng(0).normal(size=2**22).astype(np.float32).tobytes()
  with open(os.path.join(directory, "model.safetensors"), "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for start in range(0, offset, len(block)):
      file.write(block[: min(len(block), offset - start)])
  return offset


def load_checkpoint(gigabytes: float, directory: str) -> None:
  """Loads and prints the peak in bytes and the seconds."""
  config = model_config(gigabytes)
  opened = source.ModelSource(config, None, None, None, None, None, tensors.find_tensors(directory))
  _, abstract = vlm.abstract_params(config)
  mesh = meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  place = jax.tree.map(lambda _: meshes.replicated(mesh), abstract)
  before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
  params = jax.block_until_ready(load.load_params(opened, meshes.place(abstract, place)))
  seconds = time.perf_counter() - start
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert trees.size(params) * 4 == sum(leaf.nbytes for leaf in trees.flatten(params).values())
  print(before * 1024, peak * 1024, seconds)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--gigabytes", type=float, default=2.0)
  parser.add_argument("--directory", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.directory:
    load_checkpoint(arguments.gigabytes, arguments.directory)
    return
  with tempfile.TemporaryDirectory() as directory:
    size = write_checkpoint(model_config(arguments.gigabytes), directory)
    command = [sys.executable, __file__, f"--gigabytes={arguments.gigabytes}"]
    done = subprocess.run(
      [*command, f"--directory={directory}"], check=True, capture_output=True, text=True
    )
  before, peak, seconds = map(float, done.stdout.split())
  print(
    f"checkpoint {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB = {peak / size:.2f} x "
    f"(of which {before / 1e9:.2f} GB before loading), {seconds:.1f} s"
  )


if __name__ == "__main__":
  main()
