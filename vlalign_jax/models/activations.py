"""Activation functions under their names in Hugging Face configs."""

import functools

import jax

from vlalign_jax.errors import InputError


def quick_gelu(x):
  """Returns x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  "quick_gelu": quick_gelu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
}


def check(name: str, where: str) -> str:
  """Returns the name; raises an InputError that begins with `where` if it is unknown."""
  if name not in ACTIVATIONS:
    raise InputError(f"{where}: activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
  return name
