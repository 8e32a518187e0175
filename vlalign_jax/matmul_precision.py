"""Makes float32 mean float32: accelerators round the factors of products unless they are told."""

import os
from typing import Any

import jax
from absl import logging

HIGHEST = "highest"


def set_for(dtype: str, platform: str) -> None:
  """Sets the precision of matrix products for a run.

  GPUs compute float32 products in TF32 by default (10 bits of mantissa), and TPUs in one pass of
  bfloat16 (8 bits). The environment's JAX_DEFAULT_MATMUL_PRECISION is kept.

  Args:
    dtype: the config's model.dtype. With bfloat16 or float16 only what an earlier call has set is
      taken back: TPU kernels refuse it for such factors.
    platform: of the devices: cpu, gpu or tpu.
  """
  if os.environ.get("JAX_DEFAULT_MATMUL_PRECISION"):
    return
  if dtype != "float32":
    settings: Any = jax.config
    if settings.jax_default_matmul_precision == HIGHEST:  # of an earlier run of this process
      jax.config.update("jax_default_matmul_precision", None)
    return
  jax.config.update("jax_default_matmul_precision", HIGHEST)
  if platform != "cpu":
    logging.info(
      "model.dtype=float32: products are computed in full precision, which is slower than TF32 or"
      " bfloat16 passes; JAX_DEFAULT_MATMUL_PRECISION=default has those"
    )
