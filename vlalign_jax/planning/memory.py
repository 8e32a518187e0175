"""Bytes of a step on one device, by formula: what training holds, saves, gathers and works with."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vlalign_jax import trees
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.planning import learning, residuals
from vlalign_jax.planning.workload import Workload
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    params, optimizer, gradients: what the shardings say, trained and frozen parameters alike.
    reference: of params, the copy that DPO compares with.
    residuals: what the forward pass of a micro-batch saves for the backward pass.
    gathered: one layer's parameters, brought together where they are split.
    working: what comes and goes: the output head or one layer's backward pass, and with several
      micro-batches the gradients of one beside their sum.
    host: bytes of the optimizer that are kept in host memory instead.
  """

  params: float
  optimizer: float
  gradients: float
  residuals: float
  gathered: float
  working: float
  reference: float = 0.0
  host: float = 0.0

  @property
  def minimum(self) -> float:
    """What no order of operations can do without."""
    return self.params + self.optimizer + self.gradients + self.residuals + self.gathered

  @property
  def estimate(self) -> float:
    """What a program may be expected to take."""
    return self.minimum + self.working


def count(program, config, model: ModelConfig, mesh, workload: Workload) -> Memory:
  """Bytes of a step of a program.

  Args:
    program: `steps.program.Program`.
    config: of the run.
    model: the architecture.
    mesh: over which it runs.
    workload: of the step.
  """
  moments = device_bytes(program.state.optimizer)
  host = device_bytes(program.state.optimizer, on_host=True)
  language, vision = (
    program.params["language"]["layers"],
    program.params["vision"].get("layers", {}),
  )
  gathered = max(_gathered(stack, config, mesh) for stack in (language, vision))
  gradients = _gradients(program, config, mesh)
  given = (config, model, workload, learning.of(program), meshes.tensor_size(mesh))
  return Memory(
    params=device_bytes(program.state.params) + device_bytes(program.frozen),
    optimizer=moments,
    gradients=gradients,
    residuals=residuals.saved(*given),
    gathered=gathered,
    working=residuals.working(*given) + gradients * (workload.accumulation > 1),
    reference=device_bytes(program.frozen.get("reference", {})),
    host=host,
  )


def device_bytes(tree, on_host: bool = False) -> float:
  """Bytes that one device holds of a tree of shapes with shardings, in its own memory or not."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if (leaf.sharding.memory_kind in ("pinned_host", "unpinned_host")) == on_host
  )


def _gradients(program, config, mesh) -> float:
  """Sums over micro-batches are float32."""
  trained = program.state.params
  dtype = jnp.float32 if config.grad_accumulation > 1 else config.model.param_dtype
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), trained)
  split = zero.shardings(mesh, shapes, split=config.mesh.zero_stage >= 2)
  return device_bytes(meshes.place(shapes, split))


def _gathered(stack, config, mesh) -> float:
  """One layer in the dtype it is used in, as `tensor` leaves it; nothing if it is never split."""
  if not stack or config.mesh.zero_stage < 3 or mesh.shape["fsdp"] == 1:
    return 0.0
  layers = next(iter(trees.flatten(stack).values())).shape[0]
  whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stack)) / layers
  return whole * jnp.dtype(config.model.dtype).itemsize / mesh.shape["tensor"]
