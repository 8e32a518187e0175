"""Slots for prompts: programs that put prompts into slots, and decode all slots for a few tokens.

A slot holds a prompt with its N samples, which share the prompt's keys and values. Slots do not
begin together: each has its own number of tokens. Answers do not depend on slots.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Slots:
  """Compiled programs; each has one compilation for each length of prompts (`refill`: two).

  Attributes:
    mesh: the mesh that slots are split over; None: one device.
    sampling: how tokens are chosen.
    pad_id: id of the tokens after an answer's end.
    look_every: C, tokens that `decode` gives each slot.
    empty: (B slots, S places for a prompt) -> State without prompts.
    refill: (params, State, batch, int32[..] streams, int32[P] rows, int32[P] slots) -> State, whose
      slots have the prompts of these rows of a batch with rows of S tokens. The state is given up.
      The prompts of a block of rows (a device's share of P) go to slots of the same block; a slot
      that is not below B takes none.
    decode: (params, State, seed) -> (State, Generated with M = C, bool[B, N] done, int32[] steps);
      the tokens that the samples were given by that many steps. The state is given up; the other
      results are whole on every host.
  """

  mesh: Mesh | None
  sampling: Sampling
  pad_id: int
  look_every: int
  empty: Callable
  refill: Callable
  decode: Callable

  @property
  def blocks(self) -> int:
    """Returns over how many devices slots are split."""
    return meshes.row_blocks(self.mesh)

  def shardings(self, state: State) -> State:
    """Returns where the arrays of a state are."""
    return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), _specs(state, self.mesh))

  def refill_sizes(self, slots: int, length: int) -> tuple[int, ...]:
    """Returns the prompts of each block that a run of `refill` takes, the most first."""
    most = min(slots // self.blocks, _PREFILL_TOKENS // length)
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

  def empty(slots: int, length: int) -> State:
    return _place(_empty(model, sampling, slots, length, jnp.dtype(dtype), mesh), mesh)

  def refill(params, state: State, batch, streams, rows, slots) -> State:
    picked, streams = jax.tree.map(
      lambda x: meshes.constrain_rows(jnp.take(x, rows, axis=0), mesh), (batch, streams)
    )
    new = decoder.start(nnx.merge(graphdef, params), picked, streams, sampling)
    return _place(_put(state, new, slots, mesh), mesh)

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

    none = decoder.no_answers(state.done.shape, look_every, pad_id)
    carry = state, none, jnp.zeros((), jnp.int32)
    state, answers, steps = jax.lax.while_loop(goes_on, step, carry)
    return _place(state, mesh), answers, state.done, steps

  return Slots(
    mesh=mesh,
    sampling=sampling,
    pad_id=pad_id,
    look_every=look_every,
    empty=jax.jit(empty, static_argnums=(0, 1)),
    refill=jax.jit(refill, donate_argnums=1),
    decode=jax.jit(
      decode, donate_argnums=1, out_shardings=(None, everywhere, everywhere, everywhere)
    ),
  )


def _empty(model: ModelConfig, sampling: Sampling, slots: int, length: int, dtype, mesh) -> State:
  language, N = model.language, sampling.num_return_sequences
  zeros = jnp.zeros(slots, jnp.int32)
  kept = jnp.zeros((language.layers, slots, language.kv_heads, length, language.head_dim), dtype)
  seen = (slots, N, language.vocab_size)
  return State(
    clock=jnp.zeros((), jnp.int32),
    steps=zeros,
    lengths=zeros,
    streams=zeros,
    hidden=jnp.zeros((slots, N, language.width), dtype),
    done=jnp.ones((slots, N), bool),
    seen=jnp.zeros(seen, bool) if sampling.repetition_penalty != 1 else None,
    images=jnp.zeros((slots, length), bool) if model.mmca else None,
    cache=cache.extend(kept, kept, N, decoder.places(sampling), mesh),
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
  of_cache = jax.tree.map(lambda _: cache.spec(state.cache, mesh), state.cache)
  specs = jax.tree.map(lambda _: PartitionSpec(ROWS), state._replace(cache=None))
  return specs._replace(clock=PartitionSpec(), cache=of_cache)


def _put(state: State, new: State, slots, mesh: Mesh | None) -> State:
  """Puts P new prompts into slots int32[P], each on the device that has the slot."""

  def put(state: State, new: State, slots):
    of_rows, prompts = _without_samples(state), _without_samples(new)
    count = len(state.steps)
    first = 0 if mesh is None else jax.lax.axis_index(ROWS) * count
    here = slots - first
    here = jnp.where((here >= 0) & (here < count), here, count)  # past the end: dropped
    of_rows = jax.tree.map(lambda x, new: x.at[here].set(new, mode="drop"), of_rows, prompts)
    keys, values = (
      old.at[:, here].set(new, mode="drop")
      for old, new in (
        (state.cache.prompt_keys, new.cache.prompt_keys),
        (state.cache.prompt_values, new.cache.prompt_values),
      )
    )
    kept = state.cache._replace(prompt_keys=keys, prompt_values=values)
    return of_rows._replace(clock=state.clock, cache=kept)

  if mesh is not None:
    specs = _specs(state, mesh)
    given = specs, _specs(new, mesh), PartitionSpec(ROWS)
    put = jax.shard_map(put, mesh=mesh, in_specs=given, out_specs=specs, check_vma=False)
  return put(state, new, slots)


def _without_samples(state: State) -> State:
  """Returns the arrays of a state whose first axis is rows."""
  return state._replace(clock=None, cache=None)
