"""A run goes on over another mesh shape, ZeRO stage or number of devices."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.process_group import cpu_devices
from tests.training import mesh_changes

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TIMING = "perf/"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compile_cache):
  done = subprocess.run(
    [sys.executable, "-m", "tests.training.mesh_changes", str(tmp_path_factory.mktemp("runs"))],
    env=os.environ | compile_cache | cpu_devices(8),
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def _logged(run):
  return [
    {key: value for key, value in line.items() if not key.startswith(TIMING)}
    for line in run["metrics"]
  ]


@pytest.mark.parametrize("name", mesh_changes.RUNS)
def test_it_begins_with_the_same_parameters(name, runs):
  assert runs[name]["began_equal"]
  assert (runs[name]["split"] > 0) == (name == "the same")  # ZeRO 3 alone splits parameters


def test_on_the_same_mesh_it_ends_with_the_same_bits(runs):
  assert _logged(runs["the same"]) == _logged(runs["uninterrupted"])
  assert runs["the same"]["ended_equal"]


@pytest.mark.parametrize("name", mesh_changes.RUNS)
def test_its_losses_are_those_of_the_uninterrupted_run(name, runs):
  lines, expected = (_logged(runs[run]) for run in (name, "uninterrupted"))
  assert [line["step"] for line in lines] == list(range(1, mesh_changes.STEPS + 1))
  for key in ("learned_tokens", "learning_rate"):  # the same examples
    assert [line[key] for line in lines] == [line[key] for line in expected]
  for key in ("loss", "grad_norm"):
    found, wanted = ([line[key] for line in run] for run in (lines, expected))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=key)
