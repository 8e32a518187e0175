"""Answers to a batch of prompts in one compiled program: the prompts, then token by token."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.generation import decoder
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.generation.decoder import Generated, State
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.sharding import mesh as meshes


def make_generate(
  model: ModelConfig, sampling: Sampling, *, mesh: Mesh | None = None, pad_id: int = 0, **options
):
  """Returns the compiled program `(params, batch, streams, seed) -> Generated`; see `generate`.

  Args:
    model: the architecture.
    sampling: how tokens are chosen.
    mesh: the mesh that rows are split over.
    pad_id: id of the tokens after an answer's end.
    **options: dtype and attention of `vlm.abstract_params`.

  Raises:
    InputError: the model has no language head, or does not suit the mesh or the sampling.
  """
  graphdef = decoder.open_model(model, sampling, mesh, **options)
  program = functools.partial(generate, graphdef=graphdef, sampling=sampling, pad_id=pad_id)
  return jax.jit(program, out_shardings=None if mesh is None else meshes.batch_sharding(mesh))


def generate(
  params,
  batch,
  streams,
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
    streams: int32[B], numbers that identify prompts; they choose the random numbers.
    seed: int32[].
    graphdef: of the model.
    sampling: how tokens are chosen.
    pad_id: id of the tokens after an answer's end.
  """
  model = nnx.merge(graphdef, params)
  keys = samplings.row_keys(seed, streams, sampling.num_return_sequences)

  def choose(state: State, answers: Generated, step):
    state, chosen = decoder.choose(model, state, keys, sampling, pad_id)
    return state, chosen.tokens, decoder.record(answers, chosen, step, pad_id), step + 1

  def decode(carry):
    state, newest, answers, step = carry
    return choose(decoder.read(model, state, newest), answers, step)

  state = decoder.start(model, batch, streams, sampling)
  B, N = state.done.shape
  answers = decoder.no_answers((B, N), sampling.max_new_tokens, pad_id)
  carry = choose(state, answers, jnp.zeros((), jnp.int32))
  _, _, answers, _ = jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].done), decode, carry)
  return answers
