"""The sampler of PPO: the actor's weights where decoding reads them, and answers from them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.generation import layout
from vlalign_jax.generation.generate import Generated, log_memory, make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import accumulate
from vlalign_jax.steps.program import TrainedModel

KEY = "ppo.sampling_mesh"


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Compiled functions and the mesh that they run on; nothing here is allocated.

  Attributes:
    mesh: that answers are sampled on.
    placement: path -> shape of the parameters that it reads, see `layout.placement`; empty if it
      reads the run's own where they are.
    moved: those of them that it has for itself.
    move: {path: parameter} -> the same in their places.
    sample: (parameters of `place`, prompts, int32[B] streams, seed) -> Generated; all rows are
      split over the sampler's mesh.
    to_sampler, to_run: any arrays of rows -> the same, split over the mesh of sampler or run.
    check_memory: (rows, tokens of each) -> bytes that keys and values take on each device, stated
      once; see `generate.log_memory`.
  """

  mesh: Mesh
  placement: dict[str, jax.ShapeDtypeStruct]
  moved: dict[str, jax.ShapeDtypeStruct]
  move: Callable
  sample: Callable
  to_sampler: Callable
  to_run: Callable
  check_memory: Callable

  def place(self, params: dict) -> dict:
    """Returns all parameters as `sample` takes them; those that are in place are not copied."""
    flat = trees.flatten(params)
    in_place = self.placement.keys() - self.moved.keys()
    same = {path: jax.device_put(flat[path], self.placement[path].sharding) for path in in_place}
    return trees.unflatten(flat | same | self.move({path: flat[path] for path in self.moved}))

  def answer(self, params: dict, prompts: dict, streams: jax.Array, seed) -> Generated:
    """Samples answers, as `sample` does, to prompts whose rows are split as the run splits them."""
    return self.to_run(self.sample(params, *self.to_sampler((prompts, streams)), seed))


def make_sampler(
  config,
  model: ModelConfig,
  actor: TrainedModel,
  sampling: Sampling,
  mesh: Mesh,
  length: int,
  held: float,
  pad_id: int = 0,
) -> Sampler:
  """Returns the sampler of a run.

  Args:
    config: of the run.
    model: the actor's architecture.
    actor: has the shapes of its parameters.
    sampling: of answers.
    mesh: of the run.
    length: tokens of the longest row of prompts.
    held: bytes that a device holds while answers are sampled, for `auto`.
    pad_id: the token that follows an answer's end.

  Raises:
    InputError: ppo.sampling_mesh does not suit the devices, the heads or the rows.
  """
  settings, dtype = config.ppo, config.model.dtype
  num_rows = config.batch_size // settings.sample_parts
  own, wanted = mesh, layout.sizes(settings.sampling_mesh, KEY)
  if settings.sampling_mesh == layout.AUTO:
    demand = layout.Demand(model, sampling, num_rows, length, dtype)
    chosen = layout.choose(own, actor.params, demand, held)
  else:
    chosen = layout.make_mesh(own, wanted, model, KEY) if wanted else None
  if chosen is not None:
    meshes.check_rows(num_rows, chosen, KEY)
  placement = {} if chosen is None else layout.placement(chosen, actor.params, dtype)
  flat = trees.flatten(actor.params)
  moved = {
    path: wanted for path, wanted in placement.items() if not layout.is_in_place(flat[path], wanted)
  }
  mesh = own if chosen is None else chosen
  options = {"dtype": dtype, "attention": config.model.attention, "pad_id": pad_id}
  generate = make_generate(model, sampling, mesh=mesh, **options)

  @functools.cache
  def check_memory(rows, length):
    remedy = (
      "raise ppo.sample_parts, or lower batch_size, ppo.num_generations or ppo.max_new_tokens"
    )
    rows //= settings.sample_parts
    return log_memory(model, sampling, rows, length, dtype, mesh, remedy)

  return Sampler(
    mesh=mesh,
    placement=placement,
    moved=moved,
    move=layout.make_move(moved),
    sample=_by_parts(generate, mesh, settings.sample_parts),
    to_sampler=_copy_rows(mesh),
    to_run=_copy_rows(own),
    check_memory=check_memory,
  )


def _copy_rows(mesh: Mesh):
  return jax.jit(lambda rows: rows, out_shardings=meshes.batch_sharding(mesh))


def _by_parts(generate, mesh: Mesh, parts: int):
  """Samples some rows at a time, so that one cache is freed before the next is made."""

  def whole(params, prompts, streams, seed):
    def of_part(part):
      part = jax.tree.map(lambda x: meshes.constrain_rows(x, mesh), part)
      return generate(params, *part, seed)

    if parts == 1:
      return of_part((prompts, streams))
    given = accumulate.split_rows((prompts, streams), parts)
    return jax.tree.map(accumulate.join_rows, jax.lax.map(of_part, given))

  return jax.jit(whole, out_shardings=meshes.batch_sharding(mesh))
