"""Answers to a batch of prompts, in one compiled program: read the prompts, then token by token."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import cache
from vlalign_jax.models.vlm import LANGUAGE, ModelConfig, abstract_params
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero


class Generated(NamedTuple):
  """N answers to each of B prompts, with room for M tokens.

  Attributes:
    tokens: int32[B, N, M], a stop token included; padding behind an answer's end.
    lengths: int32[B, N], tokens of each answer, its stop token included.
    ended: bool[B, N], whether it has one; otherwise it was cut at M.
    log_probabilities: float32[B, N, M], of the tokens under the model itself, before penalties and
      truncation: what a training forward pass gives. If what is asked for is `tempered`, at the
      temperature and among the tokens that may be chosen. 0 behind the end.
    drawn_log_probabilities: float32[B, N, M], under the distribution that they were drawn from.
  """

  tokens: jax.Array
  lengths: jax.Array
  ended: jax.Array
  log_probabilities: jax.Array
  drawn_log_probabilities: jax.Array


class _State(NamedTuple):
  step: jax.Array  # int32[], tokens that are written
  newest: jax.Array  # int32[B, N], the last of them
  done: jax.Array  # bool[B, N]
  seen: jax.Array | None  # bool[B, N, V]
  held: cache.Cache
  answers: Generated


def make_generate(model: ModelConfig, sampling: Sampling, *, mesh: Mesh | None = None, **options):
  """The compiled program, `(params, rows, prompts, seed) -> Generated`; see `generate`.

  Args:
    model: the architecture.
    sampling: what is asked for.
    mesh: over which rows are split.
    **options: dtype and attention of `vlm.abstract_params`; gather and pad_id of `generate`.

  Raises:
    InputError: the model has no language head, or the mesh or what is asked for does not suit it.
  """
  if model.head != LANGUAGE:
    raise InputError("a reward model generates no text; give the policy's model.init_from")
  samplings.check(sampling, model.language.vocab_size)
  if mesh is not None:
    meshes.check_heads(mesh, model.language.heads, model.language.kv_heads)
  of_model = {name: options.pop(name) for name in ("dtype", "attention") if name in options}
  graphdef, _ = abstract_params(model, mesh=mesh, **of_model)
  program = functools.partial(generate, graphdef=graphdef, sampling=sampling, **options)
  placement = None if mesh is None else meshes.batch_sharding(mesh)
  return jax.jit(program, out_shardings=placement)


def generate(
  params,
  rows,
  prompts,
  seed,
  *,
  graphdef,
  sampling: Sampling,
  gather: bool = False,
  pad_id: int = 0,
) -> Generated:
  """Answers prompts; to be called under `jax.jit`.

  An answer depends on its prompt, the seed and its number alone, not on the rest of the batch nor
  on padding (up to rounding: other shapes may add in another order).

  Args:
    params: nested dict, or several that `trees.merge` joins, of all parameters.
    rows: one prompt from the start of each row, see ARCHITECTURE.md, "Rows": tokens, positions,
      segments, image_slots, and images or image_features. Empty rows get no answers.
    prompts: int32[B], numbers that tell prompts apart; they choose the random numbers.
    seed: int32[].
    graphdef: of the model.
    sampling: what is asked for.
    gather: bring the language model's parameters together over `fsdp`, in the dtype in which they
      are used, once before the first token; else at every token, a layer at a time.
    pad_id: what stands behind an answer's end.
  """
  model = nnx.merge(graphdef, params)
  mesh = model.options["mesh"]
  if gather:
    model = nnx.merge(graphdef, _gathered(params, mesh, model.language.embedding.dtype))
  N, M = sampling.num_return_sequences, sampling.max_new_tokens
  B, V = rows["tokens"].shape[0], model.config.language.vocab_size
  lengths = jnp.sum(rows["segments"] > 0, axis=1)
  images = model.image_tokens(rows)
  keys = samplings.row_keys(seed, prompts, N)

  def write(state: _State, hidden) -> _State:
    """Chooses the tokens of a step from hidden states [B, N, D]."""
    logits = _logits(model, hidden, mesh)
    tokens, own, drawn = samplings.choose(logits, state.seen, keys, state.step, sampling)
    alive = ~state.done
    tokens = jnp.where(alive, tokens, pad_id)
    stops = jnp.isin(tokens, jnp.array(sampling.stop_tokens, jnp.int32)) & alive

    def put(array, values):
      values = jnp.where(alive, values, jnp.asarray(pad_id if array.dtype == jnp.int32 else 0))
      values = values.astype(array.dtype)[..., None]
      return jax.lax.dynamic_update_slice_in_dim(array, values, state.step, axis=2)

    answers = Generated(
      tokens=put(state.answers.tokens, tokens),
      lengths=state.answers.lengths + alive,
      ended=state.answers.ended | stops,
      log_probabilities=put(state.answers.log_probabilities, own),
      drawn_log_probabilities=put(state.answers.drawn_log_probabilities, drawn),
    )
    seen = state.seen
    if seen is not None:
      seen |= jax.nn.one_hot(tokens, V, dtype=bool) & alive[..., None]
    return _State(state.step + 1, tokens, state.done | stops, seen, state.held, answers)

  def go_on(state: _State) -> _State:
    x = model.language.embed(state.newest)
    earlier = state.step - 1
    positions = jnp.broadcast_to(lengths[:, None] + earlier, (B, N))
    hidden, newest = model.language.decode(
      x, positions, state.held, lengths, earlier, images=images, mesh=mesh
    )
    held = cache.append(state.held, newest, earlier, mesh)
    return write(state._replace(held=held), hidden)

  x = model.embed(rows)
  places = (rows[name] for name in ("positions", "segments"))
  options = {"images": images, "mesh": mesh, "attention": model.options["attention"]}
  hidden, prompt_cache = model.language.prefill(x, *places, **options)
  last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
  empty = jnp.zeros((B, N), jnp.int32)
  none = jnp.zeros((B, N, M), jnp.float32)
  state = _State(
    step=jnp.zeros((), jnp.int32),
    newest=empty,
    done=jnp.broadcast_to(lengths[:, None] == 0, (B, N)),
    seen=_seen(rows, N, V) if sampling.repetition_penalty != 1 else None,
    held=cache.extend(*prompt_cache, N, max(M - 1, 1), mesh),
    answers=Generated(jnp.full((B, N, M), pad_id), empty, empty > 0, none, none),
  )
  state = write(state, jnp.broadcast_to(last, (B, N, last.shape[-1])))
  state = jax.lax.while_loop(lambda s: (s.step < M) & ~jnp.all(s.done), go_on, state)
  return state.answers


def _logits(model, hidden, mesh: Mesh | None):
  """float32[B, N, V], whole on the devices that hold the row."""
  kernel = meshes.constrain_vocabulary(model.head_kernel().astype(hidden.dtype), mesh)
  logits = jnp.einsum("BND,DV->BNV", hidden, kernel, preferred_element_type=jnp.float32)
  return meshes.constrain_rows(meshes.constrain_vocabulary(logits, mesh), mesh)


def _seen(rows, samples: int, vocab_size: int):
  """bool[B, N, V], tokens of the prompts."""
  B = rows["tokens"].shape[0]
  row = jnp.arange(B)[:, None]
  # Padding is put outside, where it is dropped.
  tokens = jnp.where(rows["segments"] > 0, rows["tokens"], vocab_size)
  seen = jnp.zeros((B, vocab_size), bool).at[row, tokens].set(True, mode="drop")
  return jnp.broadcast_to(seen[:, None], (B, samples, vocab_size))


def _gathered(params, mesh: Mesh | None, dtype):
  """Parameters with the language model's split over `tensor` alone, its matrices cast."""

  def bring(path, leaf):
    if not path.startswith("language/"):
      return leaf
    matrix = path.endswith(("/kernel", "/embedding", "/lora_a", "/lora_b"))
    return leaf.astype(dtype) if matrix else leaf

  params = trees.map_paths(bring, params)
  if mesh is None:
    return params
  language = {"language": params["language"]}
  together = jax.lax.with_sharding_constraint(language, zero.shardings(mesh, language, split=False))
  return params | together


def log_memory(
  model: ModelConfig,
  sampling: Sampling,
  rows: int,
  length: int,
  dtype,
  mesh: Mesh,
  mend: str = "lower batch_size, generation.num_return_sequences or generation.max_new_tokens",
) -> int:
  """States the cache of a batch before it is allocated, and refuses one that cannot fit.

  Args:
    model: the architecture.
    sampling: what is asked for.
    rows: B of the batch.
    length: S, tokens of its rows.
    dtype: of activations.
    mesh: over which it runs.
    mend: what to change, for the error.

  Returns:
    Bytes on each device.

  Raises:
    InputError: the devices say how much memory is free, and it is less.
  """
  whole = cache.cache_bytes(
    model.language,
    rows,
    length,
    sampling.num_return_sequences,
    sampling.max_new_tokens,
    jnp.dtype(dtype).itemsize,
  )
  each = whole // mesh.size
  logging.info(
    "keys and values of %d prompts of up to %d tokens with %d answers of up to %d: %.3f GB on each "
    "device",
    rows,
    length,
    sampling.num_return_sequences,
    sampling.max_new_tokens,
    each / 1e9,
  )
  known = mesh.local_devices[0].memory_stats() or {}
  free = known.get("bytes_limit", each) - known.get("bytes_in_use", 0)
  if "bytes_limit" in known and each > free:
    raise InputError(
      f"the keys and values of {rows} prompts x {sampling.num_return_sequences} answers take "
      f"{each / 1e9:.1f} GB on each device, and {free / 1e9:.1f} GB are free; {mend}, or "
      "split over more devices"
    )
  return each
