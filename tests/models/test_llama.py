"""The language model where parity in float32 does not test it: bfloat16 gradients, biases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlalign_jax.models import llama, rope

CONFIG = llama.LanguageConfig(
  vocab_size=7,
  width=8,
  mlp_width=8,
  layers=1,
  heads=2,
  kv_heads=1,
  head_dim=4,
  norm_epsilon=1e-6,
  rope=rope.RopeConfig(),
)
TYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def test_embedding_gradient_of_a_frequent_token_is_summed_in_float32():
  model = llama.LanguageModel(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  tokens = jnp.full((4, 1024), 3)

  graphdef, params = nnx.split(model)

  def total(params):
    embedded = nnx.merge(graphdef, params).embed(tokens)
    assert embedded.dtype == jnp.bfloat16
    return jnp.sum(embedded.astype(jnp.float32))

  gradient = jax.grad(total)(params).embedding.embedding[...]
  # bfloat16 cannot count beyond 256.
  np.testing.assert_array_equal(gradient[3], 4096)
  np.testing.assert_array_equal(np.delete(gradient, 3, axis=0), 0)


@pytest.mark.parametrize(
  ("keys", "with_bias"),
  [
    ({}, ""),
    ({"attention_bias": True}, "query key value out"),
    ({"qkv_bias": True}, "query key value"),
  ],
)
def test_biases_of_attention(keys, with_bias):
  config = dataclasses.replace(CONFIG, **keys)
  build = lambda: llama.LanguageModel(config, **TYPES, rngs=nnx.Rngs(0))  # noqa: E731
  params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))
  maps = params["layers"]["attention"]
  assert {name for name, leaves in maps.items() if "bias" in leaves} == set(with_bias.split())
