"""What keys and values take on a device, stated before they are allocated."""

from collections.abc import Iterable

import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from vlalign_jax.errors import InputError
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import cache
from vlalign_jax.models.vlm import ModelConfig

_ADVICE = (
  "lower batch_size, generation.num_return_sequences or generation.max_new_tokens, or set "
  "generation.cache_dtype=int8"
)


def cache_bytes(
  model: ModelConfig, sampling: Sampling, groups: Iterable[tuple[int, int]], dtype
) -> int:
  """Returns the bytes of keys and values over all devices.

  Args:
    model: the architecture.
    sampling: has num_return_sequences, max_new_tokens and cache_dtype.
    groups: (prompts, places for the tokens of each) that are held at a time.
    dtype: of activations.
  """
  N, M, itemsize = (
    sampling.num_return_sequences,
    sampling.max_new_tokens,
    jnp.dtype(dtype).itemsize,
  )
  return sum(
    cache.cache_bytes(model.language, rows, length, N, M, itemsize, sampling.cache_dtype)
    for rows, length in groups
  )


def check(
  model: ModelConfig,
  sampling: Sampling,
  groups: tuple[tuple[int, int], ...],
  dtype,
  mesh: Mesh,
  advice: str = _ADVICE,
) -> int:
  """Logs the size of keys and values before they are allocated, and refuses what cannot fit.

  Args:
    model, sampling, groups, dtype: see `cache_bytes`.
    mesh: the mesh that rows are split over.
    advice: what to change, for the error.

  Returns:
    Bytes on each device.

  Raises:
    InputError: the devices report less free memory.
  """
  device_bytes = cache_bytes(model, sampling, groups, dtype) // mesh.size
  N, rows = sampling.num_return_sequences, sum(rows for rows, _ in groups)
  prompts = " and ".join(f"{rows} prompts of up to {length} tokens" for rows, length in groups)
  logging.info(
    "keys and values of %s with %d answers of up to %d: %.3f GB on each device",
    *(prompts, N, sampling.max_new_tokens, device_bytes / 1e9),
  )
  stats = mesh.local_devices[0].memory_stats() or {}
  free = stats.get("bytes_limit", device_bytes) - stats.get("bytes_in_use", 0)
  if "bytes_limit" in stats and device_bytes > free:
    raise InputError(
      f"the keys and values of {rows} prompts x {N} answers take {device_bytes / 1e9:.1f} GB on "
      f"each device, and {free / 1e9:.1f} GB are free; {advice}, or split over more devices"
    )
  return device_bytes
