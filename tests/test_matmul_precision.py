"""float32 is float32 on accelerators: products of programs compiled for them say so."""

import jax
import jax.numpy as jnp
import pytest

from vlalign_jax import matmul_precision
from vlalign_jax.planning import topology


def product_for_a_tpu() -> str:
  """Returns the text of a float32 product, compiled for a TPU."""
  device = topology.open_topology("v5e:1x1").devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)
  return jax.jit(lambda x, y: x @ y).lower(x, x).compile().as_text()


def test_float32_products_are_exact_on_accelerators(caplog):
  rounded = product_for_a_tpu()
  assert "operand_precision={highest,highest}" not in rounded
  with caplog.at_level("INFO", logger="absl"):
    matmul_precision.set_for("float32", "tpu")
  assert "computed in full precision" in caplog.text
  assert "operand_precision={highest,highest}" in product_for_a_tpu()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_change_nothing(dtype):
  matmul_precision.set_for(dtype, "gpu")
  assert jax.config.jax_default_matmul_precision is None
  matmul_precision.set_for("float32", "gpu")
  matmul_precision.set_for(dtype, "gpu")
  assert jax.config.jax_default_matmul_precision is None


def test_the_environment_decides(monkeypatch):
  monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "tensorfloat32")
  matmul_precision.set_for("float32", "gpu")
  assert jax.config.jax_default_matmul_precision is None
