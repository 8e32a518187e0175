"""Rotary position embedding (Su et al. 2021) with the scalings of LLaMA models."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

ROPE_KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  theta: float = 10_000.0
  kind: str = "default"
  factor: float = 1.0
  # The others are for `llama3` only.
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_length: int = 8192


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
  """Returns the angle per position of each pair of channels.

  `linear` divides all frequencies by `factor` (position interpolation, Chen et al. 2023). `llama3`
  divides only those with wavelengths near or above the original context, as LLaMA 3.1.

  Returns:
    float32[head_dim / 2], radians per position.
  """
  frequencies = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if config.kind == "linear":
    frequencies = frequencies / config.factor
  elif config.kind == "llama3":
    wavelengths = 2 * math.pi / frequencies
    low, high = config.low_frequency_factor, config.high_frequency_factor
    blend = np.clip((config.original_length / wavelengths - low) / (high - low), 0.0, 1.0)
    frequencies = (1 - blend) * frequencies / config.factor + blend * frequencies
  return frequencies.astype(np.float32)


def rotation(config: RopeConfig, head_dim: int, positions):
  """Returns cosines and sines of positions, float32[B, T, 1, head_dim / 2] each."""
  angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config, head_dim)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cosines, sines):
  """Rotates channel i against channel i + head_dim / 2 (the pairing of LLaMA's released weights).

  Args:
    x: float[B, T, H, head_dim].
    cosines, sines: from `rotation`.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cosines - second * sines, second * cosines + first * sines]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
