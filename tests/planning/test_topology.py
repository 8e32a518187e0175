"""Names of devices, and the errors for those that nobody makes."""

import importlib.util
import math
import pathlib

import jax
import pytest

from vlalign_jax.errors import InputError
from vlalign_jax.hlo import loops
from vlalign_jax.planning import compiled, topology
from vlalign_jax.sharding import chips


def test_a_tpu_slice_that_is_not_there():
  slice_ = topology.open_topology("v5e:2x4")
  assert len(slice_.devices) == 8
  assert {device.platform for device in slice_.devices} == {"tpu"}
  assert jax.default_backend() == "cpu"


@pytest.mark.parametrize(
  ("name", "count"),
  [("v5e:1x1", 1), ("v4:2x2x2", 8), ("v5p:2x2x4", 16), ("v5p:4x4x8", 128), ("v6e:16x16", 256)],
)
def test_slices_have_a_device_for_each_chip(name, count):
  assert len(topology.open_topology(name).devices) == count


@pytest.mark.parametrize("kind", chips.TPUS)
def test_hbm_is_what_the_compiler_lets_a_program_have(kind):
  """The compiler refuses a program that is far too large, and names the memory that there is."""
  slice_ = topology.open_topology(f"{kind}:2x2" + "x1" * (chips.TORUS[kind] - 2))
  sharding = jax.sharding.SingleDeviceSharding(slice_.devices[0])
  huge = jax.ShapeDtypeStruct((2**40,), "int8", sharding=sharding)
  with pytest.raises(jax.errors.JaxRuntimeError) as refused:
    jax.jit(lambda x: (x[::-1] * x).sum()).lower(huge).compile()
  available = float(str(refused.value).split("available HBM (")[1].split("G)")[0])
  assert math.isclose(available * chips.GIB, slice_.chip.memory)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("", "no devices known by that name; there are TPU slices (v4, v5e, v5p, v6e) such as v5e:4x4"),
    ("v7:2x2", "no devices known by that name"),
    ("cpu:0", "no devices known by that name"),
    ("gpu:h100", "no devices known by that name"),
    ("gpu:h100x12", "nodes have 8 GPUs; name a multiple"),
    ("gpu:b7x8", "GPUs (a100, a100-40gb, h100, h200) such as gpu:h100x8"),
    ("v5e", "not a slice of v5e; choose from 1x1, 2x2, 2x4, 4x4"),
    ("v5e:3x3", "not a slice of v5e; choose from 1x1, 2x2, 2x4, 4x4"),
    ("v5e:4x4x4", "choose from"),
    ("v5p:4x4", "not a slice of v5p; hosts have 2x2x1 chips; write for example v5p:2x2x1"),
    ("v5p:2x3x4", "not a slice of v5p"),
    ("v5p:2x2x99", "at most 24 along an axis"),
    ("v5p:0x2x2", "not a slice of v5p"),
  ],
)
def test_names_that_are_refused(name, expected):
  with pytest.raises(InputError) as caught:
    topology.open_topology(name)
  assert str(caught.value).startswith(f"--topology={name}: ")
  assert expected in str(caught.value)


def test_more_cpus_than_jax_has_started_with():
  jax.devices()
  with pytest.raises(InputError, match="64 CPU devices are wanted; JAX has started with"):
    topology.open_topology("cpu:64")


def _without(monkeypatch, *missing):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name in missing else find(name)
  )


def test_without_a_compiler_the_line_that_installs_it(monkeypatch):
  _without(monkeypatch, "libtpu", "jax_plugins")
  with pytest.raises(
    InputError, match="for TPUs is not installed.*pip install -r requirements-tpu"
  ):
    topology.open_topology("v5e:1x1")
  line = "for GPUs is not installed.*pip install --no-deps -r requirements-gpu-plan.txt"
  with pytest.raises(InputError, match=line):
    topology.open_topology("gpu:h100x8")
  for line in (topology.INSTALL_LIBTPU, topology.INSTALL_CUDA):
    assert (pathlib.Path(__file__).parents[2] / line.split()[-1]).exists()


@pytest.mark.skipif(
  not topology.has_cuda_plugin(), reason=f"the compiler for GPUs: {topology.INSTALL_CUDA}"
)
@pytest.mark.parametrize(("name", "chip"), chips.GPUS.items())
def test_a_gpu_that_is_not_there(name, chip):
  """Runs if requirements-gpu-plan.txt is installed."""
  gpus = topology.open_topology(f"gpu:{name}x2")
  assert gpus.chip == chip
  assert {device.platform for device in gpus.devices} == {"gpu"}
  mesh = jax.sharding.Mesh(gpus.devices, ("x",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  x = jax.ShapeDtypeStruct((256, 512), "bfloat16", sharding=split)
  program = compiled.compile_program(
    lambda: jax.jit(lambda x: (x.T @ x).sum()).lower(x), 2, "gpu", loops.ONCE
  )
  assert program.flops == 2 * 128 * 512 * 512
  assert program.arguments == 128 * 512 * 2
  assert "all-reduce" in program.traffic
  assert len(topology.open_topology(f"gpu:{name}x16").devices) == 16


@pytest.mark.slow
def test_a_program_is_refused_by_its_peak():
  """The compiler refuses twice the sizes with twice the peak."""
  slice_ = topology.open_topology("v5e:2x2")
  sharding = jax.sharding.SingleDeviceSharding(slice_.devices[0])

  def lower(gib):
    state, x = (
      jax.ShapeDtypeStruct((int(size * chips.GIB) // 4,), "float32", sharding=sharding)
      for size in (2 * gib, gib)
    )
    step = jax.jit(lambda state, x: (state + 1, (x.cumsum()[::-1] * x).sum()), donate_argnums=0)
    return step.lower(state, x)

  memory = lower(2).compile().memory_analysis()
  peak = memory.peak_memory_in_bytes / chips.GIB
  assert math.isclose(peak, 10, abs_tol=0.01)  # arguments 6, temporaries 4, the result in place
  with pytest.raises(jax.errors.JaxRuntimeError, match=r"HLO temporaries \(20.00G\) exceeds"):
    lower(4).compile()
