"""The device's limits, measured: products and copies; and the output head at 7B widths."""

import importlib.metadata

import jax
import jax.numpy as jnp

from accelerator_lines import timing
from vlalign_jax.losses import head as heads


def device(settings):
  """Yields what runs here, with versions."""
  del settings
  first = jax.devices()[0]
  names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "nvidia-cudnn-cu12")
  names += ("nvidia-cudnn-cu13", "jax-cuda12-plugin", "jax-cuda13-plugin")
  versions = {}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  stats = first.memory_stats() or {}
  limit = {"limit_GiB": stats["bytes_limit"] / timing.GIB} if "bytes_limit" in stats else {}
  yield {"what": first.device_kind, "count": len(jax.devices()), **limit, **versions}


def product(settings):
  """Yields the rates of matrix products and of copies."""
  shapes = [(8192, 8192, 8192), (16384, 4096, 11008), (16384, 11008, 4096), (16384, 4096, 4096)]
  if settings["tiny"]:
    shapes = [(256, 256, 256)]
  for dtype in (jnp.bfloat16, jnp.float32):
    for m, k, n in shapes if dtype == jnp.bfloat16 else shapes[:1]:
      a = jax.random.normal(jax.random.key(0), (m, k), dtype)
      b = jax.random.normal(jax.random.key(1), (k, n), dtype)
      for precision in (None,) if dtype == jnp.bfloat16 else ("default", "highest"):

        def multiply(a, b, precision=precision):
          return jnp.matmul(a, b, precision=precision)

        call, _ = timing.compiled(jax.jit(multiply), a, b)
        took = timing.seconds(lambda: call(a, b), inner=20)  # noqa: B023
        what = f"{a.dtype.name} {m} x {k} x {n}" + (f", {precision}" if precision else "")
        yield {"what": what, "ms": took * 1e3, **timing.of_peak(2 * m * k * n, took)}
  size = 2**20 if settings["tiny"] else 2**30
  x = jnp.zeros(size, jnp.bfloat16)
  call = jax.jit(lambda x: x + 1)
  took = timing.seconds(lambda: call(x), inner=10)
  yield {"what": "copy, read and written", "ms": took * 1e3, "GB_per_s": 4 * size / took / 1e9}


def head(settings):
  """Yields the time of the chunked cross-entropy, forward and backward, per chunk size."""
  rows, length, width, vocabulary = (2, 64, 64, 512) if settings["tiny"] else (8, 2048, 4096, 32064)
  chunks = (32,) if settings["tiny"] else (128, 512, 2048, 4096)
  hidden = jax.random.normal(jax.random.key(0), (rows, length, width), jnp.bfloat16)
  kernel = jax.random.normal(jax.random.key(1), (width, vocabulary), jnp.float32) * 0.02
  targets = jax.random.randint(jax.random.key(2), (rows, length), 0, vocabulary)
  weights = jnp.ones((rows, length), jnp.float32)
  for chunk in chunks:

    def loss(hidden, kernel, chunk=chunk):
      return heads.cross_entropy_sum(hidden, kernel, targets, weights, chunk=chunk)

    call, _ = timing.compiled(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), hidden, kernel)
    took = timing.seconds(lambda: call(hidden, kernel), repeats=3)  # noqa: B023
    flops = 6 * rows * length * width * vocabulary
    yield {
      "what": f"{rows * length} tokens, chunk {chunk}, with gradients",
      "ms": took * 1e3,
      **timing.of_peak(flops, took),
      "temp_GiB": timing.temporaries(call),
    }
