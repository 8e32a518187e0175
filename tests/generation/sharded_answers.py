"""Writes answers on eight CPU devices; test_sharded runs it as a process.

python -m tests.generation.sharded_answers MODEL_DIRECTORY

Writes one JSON object: run -> the answers, and the shapes of gathered arrays.
"""

import json
import re
import sys

import jax
import numpy as np

from tests import parity
from tests.generation import tiny_llava
from vlalign_jax import trees
from vlalign_jax.generation import layout as layouts
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import vlm
from vlalign_jax.sharding import hosts, rules, zero
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults
from vlalign_jax.weights import load, source

ROWS = 16
# Name -> (data, fsdp, tensor, whether parameters are split over fsdp, and tensor of the sampler).
RUNS = {
  "one device": (1, 1, 1, False, 0),
  "ZeRO 3": (2, 4, 1, True, 0),
  "ZeRO 3, tensor": (1, 4, 2, True, 0),
  "ZeRO 3, moved to heads": (1, 8, 1, True, 2),
  "ZeRO 0, moved to rows": (4, 1, 2, False, 1),
}
SAMPLING = Sampling(
  12,
  num_return_sequences=3,
  temperature=1.2,
  top_k=60,
  top_p=0.95,
  repetition_penalty=1.1,
  stop_tokens=tuple(range(40)),
)


def run(opened, prompts, data: int, fsdp: int, tensor: int, split: bool, moved: int) -> dict:
  c = defaults("sft")
  c.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
  mesh = meshes.make_mesh(c.mesh, jax.devices()[: data * fsdp * tensor])
  _, abstract = vlm.abstract_params(opened.config, mesh=mesh)
  params = load.load_params(
    opened, meshes.place(abstract, zero.shardings(mesh, abstract, split=split))
  )
  pictures = parity.make_pictures(3, opened.config.vision.image_size)
  layout = [[prompt] for prompt in prompts] + [[]] * (ROWS - len(prompts))
  batch = parity.make_rows(opened.config, layout, pictures, tiny_llava.LENGTH, tiny_llava.IMAGES)
  batch = hosts.to_device(mesh, batch | {"numbers": np.arange(ROWS, dtype=np.int32)})
  numbers = batch.pop("numbers")
  if moved:
    mesh = layouts.make_mesh(mesh, {"tensor": moved}, opened.config, "ppo.sampling_mesh")
    wanted, flat = layouts.placement(mesh, params, "float32"), trees.flatten(params)
    leaves = {path: flat[path] for path in wanted}
    params = trees.unflatten(flat | layouts.make_move(wanted)(leaves))
  program = make_generate(opened.config, SAMPLING, mesh=mesh)
  compiled = program.lower(params, batch, numbers, 0).compile()
  generated = jax.device_get(compiled(params, batch, numbers, 0))
  answers = {name: array.tolist() for name, array in generated._asdict().items()}
  return answers | {"gathered": gathered_shapes(compiled.as_text())}


def gathered_shapes(program: str) -> list[list[int]]:
  """Returns the shapes of the arrays that a compiled program gathers."""
  shapes = []
  for line in program.splitlines():
    if gather := re.search(r"= (.*?) all-gather(-start)?\(", line):
      sizes = re.findall(r"\w\d+\[([\d,]*)\]", gather[1])
      shapes += [[int(n) for n in shape.split(",") if n] for shape in sizes]
  return shapes


def main(directory: str) -> None:
  rules.MIN_SIZE = 32  # all arrays of a tiny model are below the real limit
  opened = source.open_source(parity.model_group(init_from=directory))
  prompts = tiny_llava.make_prompts(opened.config)
  runs = {name: run(opened, prompts, *options) for name, options in RUNS.items()}
  print(json.dumps(runs))


if __name__ == "__main__":
  main(sys.argv[1])
