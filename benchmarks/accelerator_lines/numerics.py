"""Losses, gradient norms and greedy answers of a tiny model, here and on the CPU."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from accelerator_lines import models
from accelerator_lines.training import make_config
from vlalign_jax import trees
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.optim import optimizer
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import sft

STEPS, NEW_TOKENS = 4, 24


def values(dtype: str) -> dict:
  """Returns losses, gradient norms and greedy tokens on the default device; weights by numpy."""
  c = make_config({}, "llava15_7b")
  c.model.dtype = dtype
  c.optim.learning_rate = 1e-3
  # A GPU's float32 products are TF32 otherwise.
  precision = "highest" if dtype == "float32" else None
  jax.config.update("jax_default_matmul_precision", precision)
  model, mesh = models.architecture(c, tiny=True), meshes.make_mesh(c.mesh)
  program = sft.make_program(c, model, mesh, 1000)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path.endswith("/scale"):
      return jnp.ones(leaf.shape, leaf.dtype)
    return jnp.asarray(0.08 * rng.standard_normal(leaf.shape), leaf.dtype)

  params = trees.map_paths(draw, program.params)
  one = models.prompt_rows(models.packed_rows(model, mesh, 4, 30, 1))
  generate = make_generate(
    model, Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0), mesh=mesh, dtype=c.model.dtype
  )
  cast = jax.tree.map(lambda x: x.astype(dtype), params)
  answers = generate(cast, one, jnp.arange(4, dtype=jnp.int32), np.int32(0))
  params, frozen = trees.split(params, functools.partial(optimizer.is_trained, config=c))
  state = program.init_state(params)
  rows = models.packed_rows(model, mesh, 4, 96, 2)
  losses, norms = [], []
  for _ in range(STEPS):
    state, metrics = program.train_step(state, frozen, rows)
    losses.append(float(metrics["loss"]))
    norms.append(float(metrics["grad_norm"]))
  return {"losses": losses, "norms": norms, "tokens": np.asarray(answers.tokens).tolist()}


def compare(settings):
  """Yields the gaps between this device and the CPU in float32 and bfloat16."""
  del settings
  for dtype in ("float32", "bfloat16"):
    worker = subprocess.run(
      [sys.executable, "-m", "accelerator_lines.numerics", dtype],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
      capture_output=True,
      text=True,
      check=False,
    )
    if worker.returncode:
      yield {"what": dtype, "error": worker.stderr.strip().splitlines()[-1][:300]}
      continue
    there, here = json.loads(worker.stdout.splitlines()[-1]), values(dtype)
    gaps = {
      name: float(np.max(np.abs(np.array(here[name]) / np.array(there[name]) - 1)))
      for name in ("losses", "norms")
    }
    yield {
      "what": f"{dtype}: this device against the CPU",
      "loss_gap": gaps["losses"],
      "norm_gap": gaps["norms"],
      "same_tokens": float(np.mean(np.array(here["tokens"]) == np.array(there["tokens"]))),
      "losses": here["losses"],
      "losses_cpu": there["losses"],
    }


if __name__ == "__main__":
  print(json.dumps(values(sys.argv[1])))
