"""What all tests share."""

import os

# Numbers are compared with float32 references on the CPU, and scripts are run beside this process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM at level 0, here and in the scripts: the same XLA passes, compiled in half the time or less.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory) -> dict[str, str]:
  """Compiled programs kept for the session; gives the environment of processes that share them."""
  directory = tmp_path_factory.mktemp("compiled")
  settings = {
    "jax_compilation_cache_dir": str(directory),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in before.items():
    jax.config.update(name, value)
