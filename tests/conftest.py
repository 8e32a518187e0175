"""What all tests share."""

import atexit
import os
import shutil
import tempfile

# Numbers are compared with float32 references on the CPU, and scripts are run beside this process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test waits for compilers, not for numbers. Here and in the scripts LLVM is at level 0, and XLA
# emits LLVM's code itself instead of by way of MLIR: XLA's passes are the same, and a program is
# compiled in a fifth of the time. tests/training/test_resume.py has runs without all this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    os.environ.get("XLA_FLAGS", ""),
  )
)
# pytest's workers and the scripts share what they compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest


@pytest.fixture(autouse=True)
def precision():
  """Takes back the precision of products that a float32 run in this process has set.

  A test that compiles bfloat16 kernels for TPUs may come after it; they refuse that precision.
  """
  before = jax.config.jax_default_matmul_precision
  jax.config.update("jax_default_matmul_precision", None)
  yield
  jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory) -> dict[str, str]:
  return {}
