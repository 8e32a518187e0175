"""Every ZeRO stage computes the numbers of one device, and splits the trees that it should."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests import parity, tiny_models
from tests.process_group import cpu_devices
from tests.sharding import zero_steps
from vlalign_jax.errors import InputError
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import rules, zero

pytestmark = pytest.mark.slow

# Run -> (tree -> number of parts).
SPLIT = {
  "stage 0": {},
  "stage 1": {"optimizer": 4},
  "stage 2": {"optimizer": 4},
  "stage 3": {"optimizer": 4, "trained": 4, "frozen": 4},
  "stage 3, tensor": {"optimizer": 8, "trained": 8, "frozen": 8},
  "stage 1, tensor": {"optimizer": 4, "trained": 2, "frozen": 2},
  "stage 3, frozen": {"optimizer": 4, "trained": 4, "frozen": 4},
  "stage 3, tensor, frozen": {"optimizer": 4, "trained": 4, "frozen": 8},
  # One half of each adapter is split over tensor, too.
  "stage 3, tensor, adapters": {"optimizer": 6, "trained": 6, "frozen": 8},
}


def run_steps(directory: str, *names: str, **model) -> dict:
  """Makes a model with the options of make_llava, and runs these steps of it; default: all."""
  tiny_models.make_llava(directory, **model)
  done = subprocess.run(
    [sys.executable, "-m", "tests.sharding.zero_steps", directory, *names],
    env=os.environ | cpu_devices(8),
    capture_output=True,
    text=True,
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return run_steps(str(tmp_path_factory.mktemp("llava")))


@pytest.mark.parametrize("name", SPLIT)
def test_numbers_equal_those_of_one_device(name, runs):
  run = runs[name]
  kind = name.rpartition(", ")[2]
  one = runs[f"one device, {kind}" if kind in ("frozen", "adapters") else "one device"]
  assert_equal(run, one)


def test_numbers_of_a_siglip_tower_equal_those_of_one_device(tmp_path):
  names = "stage 3, tensor, adapters", "one device, adapters"
  runs = run_steps(str(tmp_path), *names, **tiny_models.SIGLIP)
  run, one = (runs[name] for name in names)
  assert_equal(run, one)
  assert "vision/layers/attention/query/lora_b" in one["params"]
  assert run["share"]["frozen"] < 1 / 8 + 0.1


def assert_equal(run, one):
  assert one["loss"][2] < one["loss"][0]
  for key in ("loss", "grad_norm"):
    np.testing.assert_allclose(run[key], one[key], rtol=1e-5, err_msg=key)
  assert run["params"].keys() == one["params"].keys()
  for path, param in one["params"].items():
    assert parity.relative_error(run["params"][path], param) < 1e-5, path


@pytest.mark.parametrize("name", SPLIT)
def test_a_device_has_only_its_part(name, runs):
  for tree, share in runs[name]["share"].items():
    parts = SPLIT[name].get(tree, 1)
    # Small parameters are not split; in this tiny model they are at most a tenth of all.
    assert 1 / parts <= share <= 1 / parts + (parts > 1) / 10, tree


@pytest.mark.parametrize("name", SPLIT)
def test_no_activation_of_the_language_model_crosses_devices(name, runs):
  moved = runs[name]["moved"]
  assert moved
  if "tensor" in name:  # which sums activations after each block
    return
  assert not [shape for shape in moved if zero_steps.LENGTH in shape]
  if "stage 3" in name:  # a layer at a time, not the stack
    gathered = [shape for shape in moved if len(shape) == 3]
    assert not [shape for shape in gathered if shape[0] == runs["layers"]]


def test_an_optimizer_in_the_memory_of_the_host(runs):
  assert runs["stage 3"]["memory"] == ["pinned_host"]
  assert runs["stage 2"]["memory"] == ["device"]


def test_devices_that_cannot_access_host_memory_are_refused():
  memory = types.SimpleNamespace(kind="device")
  device = types.SimpleNamespace(device_kind="abacus", addressable_memories=lambda: [memory])
  mesh = types.SimpleNamespace(devices=np.array([device]))
  with pytest.raises(InputError, match="abacus can access device memory, not pinned_host"):
    zero.offload(mesh, {})


MESHES = {"fsdp": (1, 8, 1), "both": (1, 4, 2), "tensor": (1, 1, 8)}


@pytest.mark.parametrize(
  ("path", "shape", "sizes", "expected"),
  [
    ("language/layers/mlp/up/kernel", (32, 4096, 11008), "fsdp", (None, "fsdp")),
    ("language/layers/mlp/up/kernel", (32, 4096, 11008), "both", (None, "fsdp", "tensor")),
    ("language/layers/mlp/down/kernel", (32, 11008, 4096), "both", (None, "tensor", "fsdp")),
    ("language/layers/mlp/down/kernel", (32, 11008, 4096), "tensor", (None, "tensor")),
    ("language/layers/attention/key/bias", (32, 4096), "both", (None, "tensor")),
    ("language/layers/attention_norm/scale", (32, 4096), "fsdp", ()),  # a layer's is small
    ("language/layers/attention/query_norm/scale", (36, 128), "both", ()),  # of all heads
    ("language/embedding/embedding", (32064, 4096), "both", ("tensor", "fsdp")),
    ("language/head/kernel", (4096, 32001), "both", ("fsdp",)),
    ("vision/layers/mlp/up/kernel", (23, 1023, 4096), "fsdp", (None, None, "fsdp")),
    ("vision/layers/mlp/up/kernel", (32, 1023, 4095), "fsdp", ("fsdp",)),  # if nothing else divides
    ("projector/first/kernel", (4097, 4099), "fsdp", ()),
    ("projector/first/kernel", (100, 100), "fsdp", ()),  # too small
    ("", (), "fsdp", ()),
  ],
)
def test_specs_of_parameters(path, shape, sizes, expected):
  mesh = AbstractMesh(MESHES[sizes], meshes.AXES)
  assert rules.spec(path, shape, mesh, split=True) == PartitionSpec(*expected)
  without = PartitionSpec(*("tensor" if axis == "tensor" else None for axis in expected))
  spec = rules.spec(path, shape, mesh, split=False)
  assert tuple(spec) == tuple(without)[: len(spec)]
  assert "fsdp" not in spec


def test_a_replicated_parameter_is_logged_once(caplog):
  caplog.set_level("INFO")
  mesh = AbstractMesh(MESHES["tensor"], meshes.AXES)
  for _ in range(2):
    rules.spec("language/head/kernel", (4096, 32003), mesh, split=True)
  lines = [line for line in caplog.messages if "language/head/kernel" in line]
  assert lines == [
    "language/head/kernel (4096, 32003): replicated, mesh.tensor=8 does not divide it"
  ]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((3, -1, 1), "the nearest size that does is 2"),
    ((2, 2, 1), "make 4 devices, and there are 8"),
    ((-1, -1, 1), "one of them may be -1"),
    ((0, 1, 1), "sizes are at least 1"),
  ],
)
def test_sizes_that_make_no_mesh(sizes, message):
  with pytest.raises(InputError, match=re.escape(message)):
    meshes.make_mesh(dict(zip(meshes.AXES, sizes, strict=True)), [None] * 8)


@pytest.mark.parametrize(
  ("batch_size", "accumulation", "pack", "message"),
  [
    (4, 1, True, "the nearest that do are 8"),
    (20, 1, False, "the nearest that do are 16 and 24"),
    (24, 2, False, "the nearest that do are 16 and 32"),
    (20, 1, True, None),
    (16, 2, False, None),
  ],
)
def test_a_batch_that_leaves_devices_without_work(batch_size, accumulation, pack, message):
  mesh = AbstractMesh(MESHES["fsdp"], meshes.AXES)
  if message is None:
    meshes.check_batch(batch_size, accumulation, pack, mesh)
    return
  with pytest.raises(InputError, match=message):
    meshes.check_batch(batch_size, accumulation, pack, mesh)


def test_heads_that_tensor_would_cut():
  mesh = AbstractMesh(MESHES["tensor"], meshes.AXES)
  meshes.check_heads(mesh, 32, 8)
  with pytest.raises(InputError, match="mesh.tensor=8 does not divide 40 heads.* 1, 2, 4$"):
    meshes.check_heads(mesh, 40, 4)


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  slice_index: int
  platform: str = "gpu"
  device_kind: str = "gpu"


def test_slices_lie_along_the_first_axis_that_they_divide():
  devices = [Device(number, number // 4) for number in range(8)]
  grid = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices).devices
  assert [[d.slice_index for d in part.flat] for part in grid] == [[0] * 4, [1] * 4]
  grid = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, devices).devices
  assert [{d.slice_index for d in grid[0, place]} for place in range(4)] == [{0}, {0}, {1}, {1}]
  with pytest.raises(InputError, match="2 slices.*must be a multiple of 2"):
    meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 8}, devices)
