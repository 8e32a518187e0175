"""Tests the line that out-of-memory errors end in: program, requested and existing memory, fix."""

import dataclasses
import errno
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import sft_run
from tests.bad_inputs import failing
from vlalign_jax import out_of_memory
from vlalign_jax.errors import InputError
from vlalign_jax.stages import sft

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30
# Name -> (error of XLA's compilers and allocators, requested bytes).
MESSAGES = {
  "CPU": ("RESOURCE_EXHAUSTED: Out of memory allocating 28615218128 bytes.", 28615218128),
  "GPU": (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.",
    16 * GIB,
  ),
  "GPU in units": (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.00GiB.",
    16 * GIB,
  ),
  "GPU allocator": (
    "RESOURCE_EXHAUSTED: Allocator (GPU_0_bfc) ran out of memory trying to allocate 4.00GiB "
    "(rounded to 4294967296)requested by op",
    4 * GIB,
  ),
  "GPU request": (
    "RESOURCE_EXHAUSTED: Failed to allocate request for 2.50GiB (2684354560B) on device ordinal 0",
    2.5 * GIB,
  ),
  "GPU driver": ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", None),
  "TPU compiler": (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 18.31G of 15.75G hbm. Exceeded hbm capacity by 2.57G.\n\nTotal hbm usage >= 18.8G",
    18.31 * GIB,
  ),
  "TPU runtime": (
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 1.50G. That was "
    "not possible. There are 1.20G free.; (0x0x0_HBM0)",
    1.5 * GIB,
  ),
  "TPU reserve": (
    "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 4.00G at the bottom of "
    "memory. That was not possible. There are 1.41G free, 0B reserved, and 1.41G reservable.",
    4 * GIB,
  ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_errors_of_devices(name):
  text, size = MESSAGES[name]
  with (
    pytest.raises(InputError) as caught,
    out_of_memory.explained("evaluation", sft_run.preset("sft")),
  ):
    raise jax.errors.JaxRuntimeError(text)
  message = str(caught.value)
  assert message.startswith("out of memory in evaluation: ")
  requested = f"it requested {out_of_memory.readable(size)};" if size else "request is unknown;"
  assert requested in message
  assert "\n" not in message
  memory = {"TPU compiler": "has 15.8 GiB", "TPU runtime": "1.2 GiB", "TPU reserve": "1.4 GiB"}
  assert memory.get(name, "this host has") in message
  assert "grad_accumulation" in message
  assert "batch_size" in message


def test_errors_of_hosts():
  for error in (
    np._core._exceptions._ArrayMemoryError((10**6, 10**6), np.dtype(np.float32)),
    MemoryError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
  ):
    assert out_of_memory.is_out_of_memory(error)
    assert "this host has" in out_of_memory.message("loading weights", error)
  big = np._core._exceptions._ArrayMemoryError((10**6, 10**6), np.dtype(np.float32))
  assert "requested 3.6 TiB" in out_of_memory.message("loading weights", big)


def test_other_errors_pass_unchanged():
  for error in (
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max"),
    jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"),
    RuntimeError("dictionary changed size during iteration"),
    OSError(errno.ENOENT, "No such file"),
    InputError("out of memory is what this is not"),
  ):
    with pytest.raises(type(error)) as caught, out_of_memory.explained("evaluation"):
      raise error
    assert caught.value is error


def test_memory_of_the_device_is_stated(monkeypatch):
  class Device:
    def memory_stats(self):
      return {"bytes_limit": 60 * GIB, "bytes_in_use": 50 * GIB}

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  error = jax.errors.JaxRuntimeError(MESSAGES["GPU"][0])
  message = out_of_memory.message("the training step", error)
  assert f"a device has {out_of_memory.readable(60 * GIB)}, of which" in message
  assert f"{out_of_memory.readable(50 * GIB)} are in use" in message


def test_advice_names_what_is_left_to_change(monkeypatch):
  monkeypatch.setattr(
    sys,
    "argv",
    [
      "train_ppo.py",
      "--config=configs/ppo.py:demo",
      "--workdir=x",
      "--config.num_train_epochs",
      "2",
    ],
  )
  config = sft_run.preset("ppo")
  config.model.remat, config.mesh.zero_stage = "none", 1
  advice = out_of_memory.advice(out_of_memory.TRAINING, config)
  for part in ("grad_accumulation", 'model.remat="full"', "mesh.zero_stage to 3", "mesh.fsdp"):
    assert part in advice
  devices = jax.device_count()
  plan = "python scripts/plan.py --config=configs/ppo.py:demo --config.num_train_epochs 2"
  assert advice.endswith(f"{plan} --topology=cpu:{devices}")
  assert "ppo.sample_parts" in out_of_memory.advice(out_of_memory.SAMPLING, config)
  config.model.remat, config.mesh.zero_stage = "full", 3
  advice = out_of_memory.advice(out_of_memory.TRAINING, config)
  assert "remat" not in advice
  assert "zero_stage" not in advice


def _make_step_fail(monkeypatch, field, at: int):
  """Replaces the program `field` by one that runs out of memory at its call number `at`."""
  calls, stage = [], sft.STAGE

  def make(*args, **kwargs):
    original = stage.make_program(*args, **kwargs)
    step = getattr(original, field)

    def call(*args, **kwargs):
      calls.append(1)
      if len(calls) == at:
        raise jax.errors.JaxRuntimeError(MESSAGES["GPU"][0])
      return step(*args, **kwargs)

    return dataclasses.replace(original, **{field: call})

  monkeypatch.setattr(sft, "STAGE", dataclasses.replace(stage, make_program=make))


def test_training_step(monkeypatch, train, records, tmp_path):
  _make_step_fail(monkeypatch, "train_step", 2)
  expected = ["out of memory in the training step", "16.0 GiB", "scripts/plan.py"]
  failing.fails(expected, train, records)
  assert failing.saved_steps(tmp_path) == [1]  # the steps before are kept


def test_a_failing_evaluation_loses_no_step(monkeypatch, train, records, tmp_path):
  _make_step_fail(monkeypatch, "eval_step", 1)
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[:4])
  expected = ["out of memory in evaluation", "16.0 GiB"]
  failing.fails(expected, train, records, **{"data.eval": held_out, "eval_every": 2})
  assert failing.saved_steps(tmp_path) == [2]


def test_loading(monkeypatch, train, records):
  def fail(*args, **kwargs):
    return np.empty((10**7, 10**7), np.float32)

  monkeypatch.setattr("vlalign_jax.weights.load.load_params", fail)
  failing.fails(["out of memory in loading weights", "364", "this host has"], train, records)


# Limits a child's address space, then runs a script as `python SCRIPT` does.
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_cpu_with_limited_address_space(tmp_path, model, records):
  """XLA refuses to allocate the keys and values of this many tokens."""
  data = sft_run.write_json(tmp_path / "data" / "eval.json", records[:2])
  done = subprocess.run(
    [
      *(sys.executable, "-c", LIMITED, "scripts/predict.py", "--config=configs/predict.py"),
      *(f"--workdir={tmp_path / 'out'}", f"--config.model.init_from={model}"),
      *(f"--config.data.eval={data}", "--config.data.max_length=192"),
      *(
        "--config.generation.max_new_tokens=200000",
        "--config.generation.num_return_sequences=2000",
      ),
      "--config.generation.temperature=1.0",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
  for part in (
    "out of memory in sampling answers: it requested ",
    "a process may have 24.0 GiB (25769803776 bytes) (ulimit -v)",
    "lower batch_size (now 16); lower generation.num_return_sequences or generation.max_new_tokens",
  ):
    assert part in error
  assert "Traceback" not in done.stderr
