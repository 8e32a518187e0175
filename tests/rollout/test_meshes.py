"""A rollout's answers depend neither on meshes and ZeRO stages nor on slots."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.process_group import cpu_devices
from tests.rollout import sampled_on_meshes
from tests.rollout.sampled_on_meshes import ONE, ONE_LORA, RUNS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compile_cache):
  process = subprocess.run(
    [sys.executable, "-m", "tests.rollout.sampled_on_meshes", str(tmp_path_factory.mktemp("runs"))],
    env=os.environ | cpu_devices(8),
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in (ONE, ONE_LORA)])
def test_answers_are_those_of_one_device(name, runs):
  answers, expected = runs[name], runs[ONE_LORA if "LoRA" in name else ONE]
  for key in ("tokens", "lengths", "ended"):
    assert answers[key] == expected[key]
  for key in ("log_probabilities", "drawn_log_probabilities"):
    np.testing.assert_allclose(answers[key], expected[key], atol=1e-5)


def test_runs_differ_in_what_they_should(runs):
  lengths = np.array(runs[ONE]["lengths"])
  assert lengths.shape == (sampled_on_meshes.PROMPTS, sampled_on_meshes.SAMPLES)
  assert lengths.all()
  assert len(set(lengths.ravel().tolist())) > 4
  assert runs[ONE]["tokens"] != runs[ONE_LORA]["tokens"]
  assert runs["ZeRO 1, heads"]["mesh"]["tensor"] == 2
  assert len(set(runs["ZeRO 1, heads, slots"]["slot_lengths"])) > 1
  assert runs["ZeRO 3, heads, slots, LoRA"]["moved"] > runs[ONE]["moved"] == 0
