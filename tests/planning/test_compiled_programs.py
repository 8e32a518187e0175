"""Every stage's programs compiled for TPUs, and for GPUs where their compiler is installed.

The models are narrow, as compiling takes long; `benchmarks/compiled_programs.py` has the widths of
a 7B model.
"""

import pytest

from benchmarks import compiled_programs
from vlalign_jax.models import tiles
from vlalign_jax.planning import topology

pytestmark = pytest.mark.slow

needs_cuda = pytest.mark.skipif(not topology.has_cuda_plugin(), reason=topology.INSTALL_CUDA)


def compiled(stage: str, devices: str, length: int, attention: str = "auto"):
  """Returns the compiled_programs.Row of each program of a stage."""
  opened = topology.open_topology(devices)
  return list(compiled_programs.compile_stage(stage, opened, length, "narrow", attention))


@pytest.mark.parametrize(
  ("stage", "devices", "kernel"),
  [
    ("sft", "v5e:1x1", "splash"),
    ("reward", "v5e:2x2", "splash"),
    ("dpo", "v5p:2x2x1", "splash"),
    ("ppo", "v5e:1x1", "splash"),
    pytest.param("sft", "gpu:h100x1", "fmha", marks=needs_cuda),
    pytest.param("reward", "gpu:h100x8", "fmha", marks=needs_cuda),
    pytest.param("dpo", "gpu:h100x8", "fmha", marks=needs_cuda),
    pytest.param("ppo", "gpu:h100x1", "fmha", marks=needs_cuda),
  ],
)
def test_every_program_calls_the_kernel_and_holds_nothing_large(stage, devices, kernel):
  for row in compiled(stage, devices, 2048):
    assert not row.problems, row.program
    assert all(kernel in name for name in row.kernels)
    if row.program in ("training step", "update"):
      forward = any("fwd" in name or name.endswith("Softmax") for name in row.kernels)
      backward = any("dkv" in name or "Backward" in name for name in row.kernels)
      assert forward
      assert backward


def test_large_arrays_are_found(monkeypatch):
  """Plain JAX attention in one tile holds all scores."""
  monkeypatch.setattr(tiles, "TILE", 4096)
  (row,) = compiled("sft", "v5e:1x1", 2048, "tiles")
  assert "calls no attention kernel" in row.problems
  assert any("the scores of all pairs" in problem for problem in row.problems)


def test_temporaries_grow_with_the_length_not_its_square():
  (short,), (long,) = (compiled("sft", "v5e:1x1", length) for length in (2048, 8192))
  assert long.temporaries < 1.15 * 4 * short.temporaries
