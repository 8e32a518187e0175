"""The sampler of PPO: the actor's weights where decoding reads them, and answers from them."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.generation import layout, memory, refill
from vlalign_jax.generation.decoder import Generated
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.generation.slot_lengths import slot_lengths
from vlalign_jax.generation.slots import Slots, groups_of, make_slots
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import accumulate
from vlalign_jax.steps.program import TrainedModel

KEY = "ppo.sampling_mesh"


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Compiled functions and the mesh that they run on; nothing here is allocated.

  Attributes:
    mesh: that answers are sampled on.
    params: path -> shape of the parameters that are read on a mesh of its own; otherwise empty.
    moved: those that the sampler has for itself; see `layout.placement`.
    move: {path: parameter} -> the same in their places.
    sample: (all parameters, prompts, int32[B] streams, seed, answered) -> Generated, whose rows are
      split as the run splits them. `answered` may be None; it is called while the devices go on,
      with (int[n] rows, int32[n, N, M] tokens, int32[n, N] lengths) of answers that have ended,
      but maybe not with the last ones.
    generate: the program that `sample` runs for each part; None: it runs `slots`.
    slots: the programs that `sample` runs; None: it runs `generate`.
    slot_lengths: places for a prompt of each slot of a device; without slots none.
    check_memory: (rows, tokens of each) -> bytes that keys and values take on each device, stated
      once; see `memory.check`.
  """

  mesh: Mesh
  params: dict[str, jax.ShapeDtypeStruct]
  moved: dict[str, jax.ShapeDtypeStruct]
  move: Callable
  sample: Callable
  generate: Callable | None
  slots: Slots | None
  slot_lengths: tuple[int, ...]
  check_memory: Callable

  def place(self, params: dict) -> dict:
    """Returns all parameters as `sample` takes them; those that are in place are not copied."""
    flat = trees.flatten(params)
    moved = self.move({path: flat[path] for path in self.moved})
    kept = {
      path: layout.named(flat[path], shape.sharding)
      for path, shape in self.params.items()
      if path not in moved
    }
    return trees.unflatten(flat | kept | moved)


def make_sampler(
  config,
  model: ModelConfig,
  actor: TrainedModel,
  sampling: Sampling,
  mesh: Mesh,
  prompt_lengths: np.ndarray,
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
    prompt_lengths: int[P], tokens of all prompts of the run.
    held: bytes that a device holds while answers are sampled, for `auto`.
    pad_id: the token that follows an answer's end.

  Raises:
    InputError: ppo.sampling_mesh does not suit the devices, the heads or the rows, or ppo.slots
      does not divide over it.
  """
  settings, dtype, length = config.ppo, config.model.dtype, int(max(prompt_lengths))
  num_rows = rows_at_a_time(config, config.batch_size)
  own, wanted = mesh, layout.sizes(settings.sampling_mesh, KEY)
  if settings.sampling_mesh == layout.AUTO:
    demand = layout.Demand(model, sampling, num_rows, length, dtype)
    chosen = layout.choose(own, actor.params, demand, held)
  else:
    chosen = layout.make_mesh(own, wanted, model, KEY) if wanted else None
  if chosen is not None:
    meshes.check_rows(num_rows, chosen, KEY)
  read, moved = {}, {}
  if chosen is not None:
    read = layout.shapes_on(chosen, actor.params, dtype)
    moved = layout.placement(chosen, actor.params, dtype)
  mesh = own if chosen is None else chosen
  options = {
    "mesh": mesh,
    "dtype": dtype,
    "attention": config.model.attention,
    "pad_id": pad_id,
  }
  slots, lengths, generate = None, (), None
  if settings.slots:
    blocks = meshes.row_blocks(mesh)
    if settings.slots % blocks:
      raise InputError(
        f"config.ppo.slots is {settings.slots}, and answers are sampled on {blocks} parts of the "
        f"devices; choose {meshes.nearest_multiples(settings.slots, blocks)}"
      )
    slots = make_slots(model, sampling, **options)
    lengths = slot_lengths(prompt_lengths, settings.slots // blocks)
    sample = _on_slots(slots, lengths, own)
  else:
    generate = make_generate(model, sampling, **options)
    sample = _by_parts(generate, mesh, settings.sample_parts, own)

  @functools.cache
  def check_memory(rows, length):
    remedy = (
      "lower ppo.slots (or raise ppo.sample_parts), batch_size, ppo.num_generations or "
      "ppo.max_new_tokens, or set ppo.cache_dtype=int8"
    )
    groups = ((rows // settings.sample_parts, length),)
    if slots is not None:
      groups = tuple((slots.blocks * group.count, group.length) for group in groups_of(lengths))
    return memory.check(model, sampling, groups, dtype, mesh, remedy)

  return Sampler(
    mesh=mesh,
    params=read,
    moved=moved,
    move=layout.make_move(moved),
    sample=sample,
    generate=generate,
    slots=slots,
    slot_lengths=lengths,
    check_memory=check_memory,
  )


def rows_at_a_time(config, rows: int) -> int:
  """Returns how many of a rollout's rows are sampled at a time, each with space in the cache."""
  if config.ppo.slots:
    return config.ppo.slots
  return rows // config.ppo.sample_parts


def _by_parts(generate, mesh: Mesh, parts: int, own: Mesh):
  """Samples some rows at a time, so that one cache is freed before the next is made.

  What comes and goes is moved between the meshes by programs of its own.
  """

  @functools.partial(jax.jit, out_shardings=meshes.batch_sharding(mesh))
  def split(*given):
    by_part = accumulate.split_rows(given, parts)
    return [jax.tree.map(operator.itemgetter(part), by_part) for part in range(parts)]

  @functools.partial(jax.jit, out_shardings=meshes.batch_sharding(own))
  def join(found):
    return jax.tree.map(lambda *arrays: accumulate.join_rows(jnp.stack(arrays)), *found)

  def sample(params, prompts, streams, seed, answered=None) -> Generated:
    rows = np.arange(len(prompts["tokens"])).reshape(-1, parts).T  # as `split` has them
    found: list[Generated] = []
    for part in split(prompts, streams):
      found.append(generate(params, *part, seed))
      if len(found) > 1:
        jax.block_until_ready(last := found[-2])
        if answered is not None:
          answered(rows[len(found) - 2], *hosts.fetch((last.tokens, last.lengths)))
    return join(found)

  return sample


def _on_slots(slots: Slots, lengths: tuple[int, ...], own: Mesh):
  """Samples on slots that take the next prompts as answers end; rows without a prompt take none."""

  @functools.partial(jax.jit, out_shardings=meshes.replicated(own))
  def count(segments):
    return jnp.sum(segments > 0, axis=1)

  def sample(params, prompts, streams, seed, answered=None) -> Generated:
    tokens = jax.device_get(count(prompts["segments"]))
    wanted = {int(row): int(row) for row in np.flatnonzero(tokens)}
    batch = refill.Batch(prompts, streams, wanted, tokens)
    found = refill.no_answers(len(tokens), slots)
    for row, answers in refill.answer(slots, params, [batch], lengths, seed):
      for array, values in zip(found, answers, strict=True):
        array[row] = values
      if answered is not None:
        answered(np.array([row]), answers.tokens[None], answers.lengths[None])
    return Generated(**hosts.whole_to_device(own, found._asdict()))

  return sample
