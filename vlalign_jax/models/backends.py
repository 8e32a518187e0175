"""The kernels of attention: what each supports, and how `model.attention` chooses one."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from absl import logging

from vlalign_jax.errors import InputError

AUTO, TILES, SPLASH, CUDNN = "auto", "tiles", "splash", "cudnn"
# Fastest first; `tiles` supports everything.
BACKENDS = (CUDNN, SPLASH, TILES)
ATTENTION_NAMES = (AUTO, *BACKENDS)


class Request(NamedTuple):
  """The properties of a call of attention that decide which kernels support it."""

  platform: str  # of the devices: cpu, gpu or tpu
  dtype: str
  head_dim: int
  segments: bool  # whether rows hold examples; otherwise every query sees all keys
  branches: bool  # whether examples may have several answers


def choose(name: str, request: Request) -> str:
  """Returns the backend to use; logs once per request why no faster one was chosen.

  Args:
    name: one of ATTENTION_NAMES. A backend other than `auto` is used for all requests that it
      supports, and `tiles` for the others.
    request: the call's properties.

  Raises:
    InputError: the devices cannot run the backend of that name.
  """
  if name != AUTO and (obstacle := _device_obstacle(name, request)):
    raise InputError(f"model.attention={name} {obstacle}; take auto or tiles")
  return _choose_first(BACKENDS if name == AUTO else (name, TILES), request)


@functools.cache
def _choose_first(names: tuple[str, ...], request: Request) -> str:
  obstacles = []
  for name in names:
    obstacle = _device_obstacle(name, request) or _obstacle(name, request)
    if obstacle is None:
      break
    obstacles.append(f"{name} {obstacle}")
  subject = "rows" if request.segments else "pictures"
  if request.branches:
    subject += " with several answers to a prompt"
  reasons = f" ({'; '.join(obstacles)})" if obstacles else ""
  logging.info("attention of %s: %s%s", subject, name, reasons)
  return name


def _device_obstacle(name: str, request: Request) -> str | None:
  """Returns why the devices cannot run a backend, or None."""
  if name == CUDNN and request.platform != "gpu":
    return "needs an NVIDIA GPU"
  if name == CUDNN and request.dtype not in ("bfloat16", "float16"):
    return f"computes in bfloat16 or float16, not {request.dtype}"
  if name == SPLASH and request.platform != "tpu":
    return "needs a TPU"
  return None


def _obstacle(name: str, request: Request) -> str | None:
  """Returns why a backend does not support a request on its own devices, or None."""
  if name == CUDNN and (request.head_dim % 8 or request.head_dim > 128):
    return f"needs heads of a multiple of 8 up to 128, not {request.head_dim}"
  return None


def request_for(platform: str, query, segments, branches) -> Request:
  """Returns the Request of attention's arguments, see `models.attention.attend`."""
  # JAX names the platform "cuda" when it compiles for a GPU that is not in this machine.
  platform = "gpu" if platform == "cuda" else platform
  return Request(
    platform,
    jnp.dtype(query.dtype).name,
    query.shape[-1],
    segments is not None,
    branches is not None,
  )
