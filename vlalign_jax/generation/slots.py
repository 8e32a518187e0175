"""Slots for prompts: programs that put prompts into slots, and decode all slots for a few tokens.

A slot holds a prompt with its N samples, which share the prompt's keys and values. Slots do not
begin together: each has its own number of tokens. Nor do they have the same places for a prompt:
`lengths` says how many each slot of a device has, and slots of one length are a group of rows.
Answers do not depend on slots.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlalign_jax.generation import decoder
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.generation.decoder import State
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import cache
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding.mesh import ROWS

# So many tokens of prompts keep a device's matrix units busy.
_PREFILL_TOKENS = 1024
# The fields of a batch with a place for each token, and what padding has there.
_PADDING = {"tokens": 0, "positions": 0, "segments": 0, "image_slots": -1}


@dataclasses.dataclass(frozen=True)
class Group:
  """The slots of a device that have S places for a prompt: `first` and the `count` - 1 after it."""

  length: int
  first: int
  count: int


def groups_of(lengths: tuple[int, ...]) -> tuple[Group, ...]:
  """Returns the groups of a device's slots, given the places of each, equal ones together."""
  found, first = [], 0
  for length, slots in itertools.groupby(lengths):
    found.append(Group(length, first, len([*slots])))
    first += found[-1].count
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Slots:
  """Compiled programs; `decode` is compiled once, `refill` twice for each group of slots.

  Attributes:
    mesh: the mesh that slots are split over; None: one device.
    sampling: how tokens are chosen.
    pad_id: id of the tokens after an answer's end.
    look_every: C, tokens that `decode` gives each slot.
    empty: (lengths) -> State without prompts, of B slots: on each device those of `lengths`.
    pick: (batch, int32[..] streams, int32[P] rows, S) -> (prompts, int32[P] streams): these rows,
      with as many tokens.
    refill: (params, State, prompts, int32[P] streams, int32[P] slots, Group) -> State, whose slots
      have these prompts. The state is given up. The prompts of a block of rows (a device's share of
      P) go to slots of the same block and of the group; a slot that is not below B takes none.
    decode: (params, State, seed) -> (State, Generated with M = C, bool[B, N] done, int32[] steps);
      the tokens that the samples were given by that many steps. The state is given up; the other
      results are whole on every host.
  """

  mesh: Mesh | None
  sampling: Sampling
  pad_id: int
  look_every: int
  empty: Callable
  pick: Callable
  refill: Callable
  decode: Callable

  @property
  def blocks(self) -> int:
    """Returns over how many devices slots are split."""
    return meshes.row_blocks(self.mesh)

  def shardings(self, state: State) -> State:
    """Returns where the arrays of a state are, on a mesh."""
    mesh = self.mesh
    assert mesh is not None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(state, mesh))


def refill_sizes(group: Group) -> tuple[int, ...]:
  """Returns the prompts of each block that a run of `refill` takes, the most first."""
  most = min(group.count, _PREFILL_TOKENS // group.length)
  return (most, 1) if most > 1 else (1,)


def make_slots(
  model: ModelConfig,
  sampling: Sampling,
  *,
  mesh: Mesh | None = None,
  pad_id: int = 0,
  dtype="float32",
  **options,
) -> Slots:
  """Returns the programs of slots.

  Args:
    model: the architecture.
    sampling: how tokens are chosen.
    mesh: the mesh that slots are split over.
    pad_id: id of the tokens after an answer's end.
    dtype: of activations.
    **options: attention of `vlm.abstract_params`.

  Raises:
    InputError: the model has no language head, or does not suit the mesh or the sampling.
  """
  graphdef = decoder.open_model(model, sampling, mesh, dtype=dtype, **options)
  look_every = max(1, sampling.max_new_tokens // 32)
  everywhere = None if mesh is None else meshes.replicated(mesh)

  def empty(lengths: tuple[int, ...]) -> State:
    return _place(_empty(model, sampling, lengths, jnp.dtype(dtype), mesh), mesh)

  def pick(batch, streams, rows, length: int):
    if everywhere is not None:  # else the compiler may split them in a way that the mesh cannot
      rows = jax.lax.with_sharding_constraint(rows, everywhere)
    picked, streams = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), (batch, streams))
    picked |= {name: _fit(picked[name], length, padding) for name, padding in _PADDING.items()}
    return picked, streams

  def refill(params, state: State, prompts, streams, slots, group: Group) -> State:
    new = decoder.start(nnx.merge(graphdef, params), prompts, streams, sampling)
    return _place(_put(state, new, slots, group, mesh), mesh)

  def decode(params, state: State, seed):
    whole = nnx.merge(graphdef, params)
    keys = samplings.row_keys(seed, state.streams, sampling.num_return_sequences)

    def step(carry):
      state, answers, number = carry
      state, chosen = decoder.choose(whole, state, keys, sampling, pad_id)
      answers = decoder.record(answers, chosen, number, pad_id)
      return decoder.read(whole, state, chosen.tokens), answers, number + 1

    def goes_on(carry):
      state, _, number = carry
      return (number < look_every) & ~jnp.all(state.done)

    B, N = state.done.shape
    none = decoder.no_answers((B, N), look_every, pad_id)
    carry = state, none, jnp.zeros((), jnp.int32)
    state, answers, steps = jax.lax.while_loop(goes_on, step, carry)
    return _place(state, mesh), answers, state.done, steps

  return Slots(
    mesh=mesh,
    sampling=sampling,
    pad_id=pad_id,
    look_every=look_every,
    empty=jax.jit(empty, static_argnums=0),
    pick=jax.jit(
      pick, static_argnums=3, out_shardings=None if mesh is None else meshes.batch_sharding(mesh)
    ),
    refill=jax.jit(refill, donate_argnums=1, static_argnums=5),
    decode=jax.jit(
      decode, donate_argnums=1, out_shardings=(None, everywhere, everywhere, everywhere)
    ),
  )


def _fit(tokens, length: int, padding: int):
  """Cuts or pads int32[P, T] to int32[P, length]."""
  missing = max(0, length - tokens.shape[1])
  return jnp.pad(tokens, ((0, 0), (0, missing)), constant_values=padding)[:, :length]


def _empty(
  model: ModelConfig, sampling: Sampling, lengths: tuple[int, ...], dtype, mesh: Mesh | None
) -> State:
  language, N, blocks = model.language, sampling.num_return_sequences, meshes.row_blocks(mesh)
  B = blocks * len(lengths)
  zeros = jnp.zeros(B, jnp.int32)
  sizes = [(blocks * group.count, group.length) for group in groups_of(lengths)]

  def of_group(rows: int, length: int) -> cache.Cache:
    kept = jnp.zeros((language.layers, rows, language.kv_heads, length, language.head_dim), dtype)
    return cache.extend(kept, kept, N, decoder.places(sampling), mesh, sampling.cache_dtype)

  return State(
    clock=jnp.zeros((), jnp.int32),
    steps=zeros,
    lengths=zeros,
    streams=zeros,
    hidden=jnp.zeros((B, N, language.width), dtype),
    done=jnp.ones((B, N), bool),
    seen=jnp.zeros((B, N, language.vocab_size), bool) if sampling.repetition_penalty != 1 else None,
    images=tuple(jnp.zeros(size, bool) for size in sizes) if model.mmca else None,
    caches=tuple(of_group(*size) for size in sizes),
  )


def _place(state: State, mesh: Mesh | None) -> State:
  """Keeps every array of a state where it is in all programs."""
  if mesh is None:
    return state
  specs = _specs(state, mesh)
  return jax.tree.map(
    lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)), state, specs
  )


def _specs(state: State, mesh: Mesh) -> State:
  """Returns how each array of a state is split."""
  of_caches = jax.tree.map(lambda _: cache.spec(state.caches[0], mesh), state.caches)
  specs = jax.tree.map(lambda _: PartitionSpec(ROWS), state._replace(caches=()))
  return specs._replace(clock=PartitionSpec(), caches=of_caches)


def _put(state: State, new: State, slots, group: Group, mesh: Mesh | None) -> State:
  """Puts P new prompts into slots int32[P] of a group, each on the device that has the slot."""

  def put(state: State, new: State, slots):
    count, number = len(state.steps), _number(state, group)
    block = 0 if mesh is None else jax.lax.axis_index(ROWS)
    here = slots - block * count
    here = jnp.where((here >= 0) & (here < count), here, count)  # past the end: dropped
    in_group = jnp.where(here < count, here - group.first, group.count)

    def set_rows(old, new):
      return old.at[here].set(new, mode="drop")

    of_rows = jax.tree.map(set_rows, _of_rows(state), _of_rows(new))
    of_cache, images = state.caches[number], state.images
    old, given = ((x.prompt_keys, x.prompt_values) for x in (of_cache, new.caches[0]))
    keys, values = jax.tree.map(
      lambda old, new: old.at[:, in_group].set(new, mode="drop"), old, given
    )
    of_cache = of_cache._replace(prompt_keys=keys, prompt_values=values)
    if images is not None:
      of_group = images[number].at[in_group].set(new.images[0], mode="drop")
      images = (*images[:number], of_group, *images[number + 1 :])
    caches = (*state.caches[:number], of_cache, *state.caches[number + 1 :])
    return of_rows._replace(clock=state.clock, images=images, caches=caches)

  if mesh is not None:
    specs = _specs(state, mesh)
    given = specs, _specs(new, mesh), PartitionSpec(ROWS)
    put = jax.shard_map(put, mesh=mesh, in_specs=given, out_specs=specs, check_vma=False)
  return put(state, new, slots)


def _number(state: State, group: Group) -> int:
  """Returns the number of a group among those of a device's state."""
  first = 0
  for number, rows in enumerate(cache.rows(state.caches)):
    if first == group.first:
      return number
    first += rows
  raise ValueError(f"no slots begin at {group.first}")


def _of_rows(state: State) -> State:
  """Returns the arrays of a state whose first axis is all rows."""
  return state._replace(clock=None, images=None, caches=None)
