"""Answers to a batch of prompts in one compiled program: the prompts, then token by token."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.errors import InputError
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import cache
from vlalign_jax.models.vlm import LANGUAGE, ModelConfig, abstract_params
from vlalign_jax.sharding import mesh as meshes


class Generated(NamedTuple):
  """N answers to each of B prompts, with room for M tokens.

  Attributes:
    tokens: int32[B, N, M], including the stop token; padding after an answer's end.
    lengths: int32[B, N], tokens of each answer, including its stop token.
    ended: bool[B, N], whether it has a stop token; otherwise it was cut at M.
    log_probabilities: float32[B, N, M], of the tokens under the model itself, before penalties and
      truncation, as a training forward pass computes them. If the sampling is `tempered`: at the
      temperature, among the tokens that may be chosen. 0 after the end.
    drawn_log_probabilities: float32[B, N, M], under the distribution that they were drawn from.
  """

  tokens: jax.Array
  lengths: jax.Array
  ended: jax.Array
  log_probabilities: jax.Array
  drawn_log_probabilities: jax.Array


class _State(NamedTuple):
  step: jax.Array  # int32[], number of generated tokens
  newest: jax.Array  # int32[B, N], the last of them
  done: jax.Array  # bool[B, N]
  seen: jax.Array | None  # bool[B, N, V]
  cache: cache.Cache
  answers: Generated


def make_generate(model: ModelConfig, sampling: Sampling, *, mesh: Mesh | None = None, **options):
  """Returns the compiled program `(params, batch, prompts, seed) -> Generated`; see `generate`.

  Args:
    model: the architecture.
    sampling: how tokens are chosen.
    mesh: the mesh that rows are split over.
    **options: dtype and attention of `vlm.abstract_params`; pad_id of `generate`.

  Raises:
    InputError: the model has no language head, or does not suit the mesh or the sampling.
  """
  if model.head != LANGUAGE:
    raise InputError("a reward model generates no text; give the policy's model.init_from")
  samplings.check(sampling, model.language.vocab_size)
  if mesh is not None:
    meshes.check_heads(mesh, model.language.heads, model.language.kv_heads)
  model_options = {name: options.pop(name) for name in ("dtype", "attention") if name in options}
  graphdef, _ = abstract_params(model, mesh=mesh, **model_options)
  program = functools.partial(generate, graphdef=graphdef, sampling=sampling, **options)
  placement = None if mesh is None else meshes.batch_sharding(mesh)
  return jax.jit(program, out_shardings=placement)


def generate(
  params,
  batch,
  prompts,
  seed,
  *,
  graphdef,
  sampling: Sampling,
  pad_id: int = 0,
) -> Generated:
  """Answers prompts; to be called under `jax.jit`.

  An answer depends on its prompt, the seed and its sample number alone, not on the rest of the
  batch nor on padding (up to rounding: other shapes may add in another order).

  Args:
    params: nested dict of all parameters.
    batch: one prompt at the start of each row, see ARCHITECTURE.md, "Rows": tokens, positions,
      segments, image_slots, and images or image_features. Empty rows get no answers.
    prompts: int32[B], numbers that identify prompts; they choose the random numbers.
    seed: int32[].
    graphdef: of the model.
    sampling: how tokens are chosen.
    pad_id: id of the tokens after an answer's end.
  """
  model = nnx.merge(graphdef, params)
  mesh = model.options["mesh"]
  N, M = sampling.num_return_sequences, sampling.max_new_tokens
  B, V = batch["tokens"].shape[0], model.config.language.vocab_size
  lengths = jnp.sum(batch["segments"] > 0, axis=1)
  images = model.image_tokens(batch)
  keys = samplings.row_keys(seed, prompts, N)

  def append_token(state: _State, hidden) -> _State:
    """Chooses the tokens of a step from hidden states [B, N, D]."""
    logits = _logits(model, hidden, mesh)
    tokens, *log_probabilities = samplings.choose(logits, state.seen, keys, state.step, sampling)
    alive = ~state.done
    tokens = jnp.where(alive, tokens, pad_id)
    stops = jnp.isin(tokens, jnp.array(sampling.stop_tokens, jnp.int32)) & alive

    def put(array, values):
      values = jnp.where(alive, values, jnp.asarray(pad_id if array.dtype == jnp.int32 else 0))
      values = values.astype(array.dtype)[..., None]
      return jax.lax.dynamic_update_slice_in_dim(array, values, state.step, axis=2)

    answers = state.answers
    answers = Generated(
      tokens=put(answers.tokens, tokens),
      lengths=answers.lengths + alive,
      ended=answers.ended | stops,
      log_probabilities=put(answers.log_probabilities, log_probabilities[0]),
      drawn_log_probabilities=put(answers.drawn_log_probabilities, log_probabilities[1]),
    )
    seen = state.seen
    if seen is not None:
      seen |= jax.nn.one_hot(tokens, V, dtype=bool) & alive[..., None]
    return _State(state.step + 1, tokens, state.done | stops, seen, state.cache, answers)

  def decode(state: _State) -> _State:
    x = model.language.embed(state.newest)
    last = state.step - 1
    positions = jnp.broadcast_to(lengths[:, None] + last, (B, N))
    hidden, newest = model.language.decode(
      x, positions, state.cache, lengths, last, images=images, mesh=mesh
    )
    return append_token(state._replace(cache=cache.append(state.cache, newest, last, mesh)), hidden)

  x = model.embed(batch)
  options = {"images": images, "mesh": mesh, "attention": model.options["attention"]}
  hidden, (prompt_keys, prompt_values) = model.language.prefill(
    x, batch["positions"], batch["segments"], **options
  )
  last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
  zeros = jnp.zeros((B, N), jnp.int32)
  zeros_of_tokens = jnp.zeros((B, N, M), jnp.float32)
  state = _State(
    step=jnp.zeros((), jnp.int32),
    newest=zeros,
    done=jnp.broadcast_to(lengths[:, None] == 0, (B, N)),
    seen=_seen(batch, N, V) if sampling.repetition_penalty != 1 else None,
    cache=cache.extend(prompt_keys, prompt_values, N, max(M - 1, 1), mesh),
    answers=Generated(
      jnp.full((B, N, M), pad_id), zeros, zeros > 0, zeros_of_tokens, zeros_of_tokens
    ),
  )
  state = append_token(state, jnp.broadcast_to(last, (B, N, last.shape[-1])))
  state = jax.lax.while_loop(lambda s: (s.step < M) & ~jnp.all(s.done), decode, state)
  return state.answers


def _logits(model, hidden, mesh: Mesh | None):
  """Returns logits float32[B, N, V], of the full vocabulary on each row's devices."""
  kernel = meshes.constrain_vocabulary(model.head_kernel().astype(hidden.dtype), mesh)
  logits = jnp.einsum("BND,DV->BNV", hidden, kernel, preferred_element_type=jnp.float32)
  return meshes.constrain_rows(meshes.constrain_vocabulary(logits, mesh), mesh)


def _seen(batch, samples: int, vocab_size: int):
  """Returns bool[B, N, V], the tokens of the prompts."""
  B = batch["tokens"].shape[0]
  row = jnp.arange(B)[:, None]
  # Padding gets an index past the end, and is dropped.
  tokens = jnp.where(batch["segments"] > 0, batch["tokens"], vocab_size)
  seen = jnp.zeros((B, vocab_size), bool).at[row, tokens].set(True, mode="drop")
  return jnp.broadcast_to(seen[:, None], (B, samples, vocab_size))


def log_memory(
  model: ModelConfig,
  sampling: Sampling,
  rows: int,
  length: int,
  dtype,
  mesh: Mesh,
  advice: str = "lower batch_size, generation.num_return_sequences or generation.max_new_tokens",
) -> int:
  """Logs the size of a batch's cache before it is allocated, and refuses one that cannot fit.

  Args:
    model: the architecture.
    sampling: has num_return_sequences and max_new_tokens.
    rows: B of the batch.
    length: S, tokens of its rows.
    dtype: of activations.
    mesh: the mesh that rows are split over.
    advice: what to change, for the error.

  Returns:
    Bytes on each device.

  Raises:
    InputError: the devices report less free memory.
  """
  N, M = sampling.num_return_sequences, sampling.max_new_tokens
  total = cache.cache_bytes(model.language, rows, length, N, M, jnp.dtype(dtype).itemsize)
  device_bytes = total // mesh.size
  logging.info(
    "keys and values of %d prompts of up to %d tokens with %d answers of up to %d: %.3f GB on each "
    "device",
    *(rows, length, N, M, device_bytes / 1e9),
  )
  stats = mesh.local_devices[0].memory_stats() or {}
  free = stats.get("bytes_limit", device_bytes) - stats.get("bytes_in_use", 0)
  if "bytes_limit" in stats and device_bytes > free:
    raise InputError(
      f"the keys and values of {rows} prompts x {N} answers take {device_bytes / 1e9:.1f} GB on "
      f"each device, and {free / 1e9:.1f} GB are free; {advice}, or split over more devices"
    )
  return device_bytes
