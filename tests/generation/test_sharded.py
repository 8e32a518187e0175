"""Answers depend neither on the number of devices nor on where the parameters are."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.generation import sharded_answers, tiny_llava
from tests.process_group import cpu_devices

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(model):
  process = subprocess.run(
    [sys.executable, "-m", "tests.generation.sharded_answers", model.directory],
    env=os.environ | cpu_devices(8),
    capture_output=True,
    text=True,
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


@pytest.mark.parametrize("name", [name for name in sharded_answers.RUNS if name != "one device"])
def test_answers_are_those_of_one_device(name, runs):
  answers, expected = runs[name], runs["one device"]
  for key in ("tokens", "lengths", "ended"):
    assert answers[key] == expected[key]
  for key in ("log_probabilities", "drawn_log_probabilities"):
    np.testing.assert_allclose(answers[key], expected[key], atol=1e-4)
  lengths = np.array(answers["lengths"])
  assert len(set(lengths[: len(tiny_llava.PROMPTS)].ravel().tolist())) > 2
  assert not lengths[len(tiny_llava.PROMPTS) :].any()


@pytest.mark.parametrize("name", ["ZeRO 3", "ZeRO 3, tensor"])
def test_gathers_a_layer_at_a_time_and_no_cache(name, runs):
  shapes = runs[name]["gathered"]
  assert shapes
  assert not [shape for shape in shapes if len(shape) > 3]  # a cache has more axes
  assert not [shape for shape in shapes if len(shape) == 3 and shape[0] == 2]  # all layers
