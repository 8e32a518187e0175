"""One step of decoding: tokens are chosen, and the model reads them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
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


class State(NamedTuple):
  """B prompts with N samples each, between the reading of a token and the choice of the next.

  Attributes:
    clock: int32[], tokens that were appended to the cache, the same for all rows.
    steps: int32[B], tokens that the samples have.
    lengths: int32[B], tokens of the prompts.
    streams: int32[B], numbers that choose the random numbers of each prompt.
    hidden: float[B, N, D], of the newest tokens.
    done: bool[B, N], samples that take no more tokens.
    seen: bool[B, N, V], tokens of prompt and sample; None without a repetition penalty.
    images: bool[Bi, S] of each group, image tokens of the prompts; None unless attention needs
      them.
    caches: keys and values of each group of rows; see `models.row_groups`.
  """

  clock: jax.Array
  steps: jax.Array
  lengths: jax.Array
  streams: jax.Array
  hidden: jax.Array
  done: jax.Array
  seen: jax.Array | None
  images: tuple[jax.Array, ...] | None
  caches: tuple[cache.Cache, ...]


class Chosen(NamedTuple):
  """The next token of each sample.

  Attributes:
    tokens: int32[B, N], padding for samples that were done.
    alive: bool[B, N], the samples that take the token.
    stops: bool[B, N], those that end with it.
    log_probabilities, drawn_log_probabilities: float32[B, N], see `Generated`.
  """

  tokens: jax.Array
  alive: jax.Array
  stops: jax.Array
  log_probabilities: jax.Array
  drawn_log_probabilities: jax.Array


def open_model(model: ModelConfig, sampling: Sampling, mesh: Mesh | None, **options):
  """Returns the structure of a model that can answer; options are those of `vlm.abstract_params`.

  Raises:
    InputError: the model has no language head, or does not suit the mesh or the sampling.
  """
  if model.head != LANGUAGE:
    raise InputError("a reward model generates no text; give the policy's model.init_from")
  samplings.check(sampling, model.language.vocab_size)
  if mesh is not None:
    meshes.check_heads(mesh, model.language.heads, model.language.kv_heads)
  return abstract_params(model, mesh=mesh, **options)[0]


def places(sampling: Sampling) -> int:
  """Returns the places of a sample in the cache: its last token is never attended to."""
  return max(sampling.max_new_tokens - 1, 1)


def start(model, batch, streams, sampling: Sampling) -> State:
  """Reads prompts, as one group of rows.

  Args:
    model: the module.
    batch: one prompt at the start of each row, see `generate.generate`.
    streams: int32[B].
    sampling: has N and M.
  """
  mesh, N = model.options["mesh"], sampling.num_return_sequences
  V = model.config.language.vocab_size
  lengths = jnp.sum(batch["segments"] > 0, axis=1)
  images = model.image_tokens(batch)
  options = {"images": images, "mesh": mesh, "attention": model.options["attention"]}
  hidden, (keys, values) = model.language.prefill(
    model.embed(batch), batch["positions"], batch["segments"], **options
  )
  last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
  B, _, D = last.shape
  return State(
    clock=jnp.zeros((), jnp.int32),
    steps=jnp.zeros(B, jnp.int32),
    lengths=lengths,
    streams=streams,
    hidden=jnp.broadcast_to(last, (B, N, D)),
    done=jnp.broadcast_to(lengths[:, None] == 0, (B, N)),
    seen=_seen(batch, N, V) if sampling.repetition_penalty != 1 else None,
    images=None if images is None else (images,),
    caches=(cache.extend(keys, values, N, places(sampling), mesh, sampling.cache_dtype),),
  )


def choose(model, state: State, keys, sampling: Sampling, pad_id: int) -> tuple[State, Chosen]:
  """Chooses the next token of each sample.

  Args:
    model: the module.
    state: of all rows.
    keys: random keys [B, N] of `sampling.row_keys`.
    sampling: how tokens are chosen.
    pad_id: the token of samples that are done.
  """
  logits = _logits(model, state.hidden, model.options["mesh"])
  tokens, *log_probabilities = samplings.choose(logits, state.seen, keys, state.steps, sampling)
  alive = ~state.done
  tokens = jnp.where(alive, tokens, pad_id)
  stops = jnp.isin(tokens, jnp.array(sampling.stop_tokens, jnp.int32)) & alive
  steps, seen = state.steps + 1, state.seen
  if seen is not None:
    seen |= jax.nn.one_hot(tokens, logits.shape[-1], dtype=bool) & alive[..., None]
  done = state.done | stops | (steps >= sampling.max_new_tokens)[:, None]
  chosen = Chosen(tokens, alive, stops, *log_probabilities)
  return state._replace(steps=steps, done=done, seen=seen), chosen


def read(model, state: State, tokens) -> State:
  """Reads the tokens int32[B, N] that were chosen."""
  mesh, earlier = model.options["mesh"], state.steps - 1
  positions = jnp.broadcast_to((state.lengths + earlier)[:, None], tokens.shape)
  hidden, newest = model.language.decode(
    model.language.embed(tokens),
    positions,
    state.caches,
    state.lengths,
    earlier,
    state.clock,
    images=state.images,
    mesh=mesh,
  )
  kept = cache.append(state.caches, newest, state.clock, mesh)
  return state._replace(clock=state.clock + 1, hidden=hidden, caches=kept)


def no_answers(shape: tuple[int, int], tokens: int, pad_id: int) -> Generated:
  """Returns [B, N] answers without tokens, with room for M."""
  room = (*shape, tokens)
  return Generated(
    tokens=jnp.full(room, pad_id, jnp.int32),
    lengths=jnp.zeros(shape, jnp.int32),
    ended=jnp.zeros(shape, bool),
    log_probabilities=jnp.zeros(room, jnp.float32),
    drawn_log_probabilities=jnp.zeros(room, jnp.float32),
  )


def record(answers: Generated, chosen: Chosen, place, pad_id: int) -> Generated:
  """Returns answers with the chosen tokens in column `place`, int32[]."""

  def put(array, values, padding):
    values = jnp.where(chosen.alive, values, padding).astype(array.dtype)[..., None]
    return jax.lax.dynamic_update_slice_in_dim(array, values, place, axis=2)

  return Generated(
    tokens=put(answers.tokens, chosen.tokens, pad_id),
    lengths=answers.lengths + chosen.alive,
    ended=answers.ended | chosen.stops,
    log_probabilities=put(answers.log_probabilities, chosen.log_probabilities, 0),
    drawn_log_probabilities=put(answers.drawn_log_probabilities, chosen.drawn_log_probabilities, 0),
  )


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
