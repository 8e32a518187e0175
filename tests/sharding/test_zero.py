"""Every ZeRO stage gives the numbers of one device, and splits what it says it splits."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests import checkpoints
from tests.sharding import zero_steps
from vlalign_jax.sharding import zero

# Stage -> trees of which a device holds its part only.
SPLIT = {
  "stage 0": set(),
  "stage 1": {"optimizer"},
  "stage 2": {"optimizer"},
  "stage 3": {"optimizer", "trained", "frozen"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("llava"))
  checkpoints.make_llava(directory)
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  done = subprocess.run(
    [sys.executable, "-m", "tests.sharding.zero_steps", directory],
    env=environment,
    capture_output=True,
    text=True,
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("stage", SPLIT)
def test_numbers_are_those_of_one_device(stage, runs):
  one = runs["one device"]
  assert one["loss"][2] < one["loss"][0]
  for key in ("loss", "grad_norm", "param_norms"):
    np.testing.assert_allclose(runs[stage][key], one[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("stage", SPLIT)
def test_one_of_four_parts_is_held(stage, runs):
  for tree, share in runs[stage]["share"].items():
    if tree in SPLIT[stage]:
      assert 0.25 <= share < 0.3, tree  # a little stays whole
    else:
      assert share == 1, tree


@pytest.mark.parametrize("stage", SPLIT)
def test_no_activation_of_the_language_model_crosses_devices(stage, runs):
  moved = runs[stage]["moved"]
  assert moved
  assert not [shape for shape in moved if zero_steps.LENGTH in shape]
  if stage == "stage 3":  # a layer at a time, not the stack
    gathered = [shape for shape in moved if len(shape) == 3]
    assert not [shape for shape in gathered if shape[0] == runs["layers"]]


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((4096, 11008), (None, "fsdp")),
    ((32, 4096, 4096), (None, "fsdp", None)),  # not the layers
    ((32, 4097, 4099), ("fsdp", None, None)),  # but if nothing else divides
    ((4097, 4099), ()),
    ((100, 100), ()),  # too small
    ((2**14,), ("fsdp",)),
    ((), ()),
  ],
)
def test_what_is_split(shape, spec):
  assert zero.split_spec(shape, 8) == PartitionSpec(*spec)
  assert zero.split_spec(shape, 1) == PartitionSpec()
