"""scripts/plan.py as users start it, on a tiny model, and its report."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import plans
from configs import dpo, reward, sft
from tests import tiny_models
from tests.planning import small
from vlalign_jax.errors import InputError
from vlalign_jax.planning import report, topology
from vlalign_jax.planning.compiled import Compiled
from vlalign_jax.sharding import chips
from vlalign_jax.sharding.chips import GIB

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("llava"))
  tiny_models.make_llava(directory)
  return directory


def _plan(*arguments, stage="sft", preset="demo"):
  """Runs scripts/plan.py, by default with the demo's preset, which compiles fast."""
  # As for users, nothing but the script keeps JAX on the CPU.
  environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
  command = [sys.executable, "scripts/plan.py", f"--config=configs/{stage}.py:{preset}", *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_eight_cpus(directory, tmp_path):
  path = tmp_path / "plan.json"
  done = _plan(
    f"--config.model.init_from={directory}",
    "--topology=cpu:8",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=-1",
    "--config.mesh.zero_stage=1",
    "--config.train.vision=false",
    f"--json={path}",
  )
  assert done.returncode == 0, done.stderr
  assert "cpu:8: 8 x CPU, mesh data=2 x fsdp=4 x tensor=1" in done.stdout
  assert "training step: compiled in" in done.stdout
  assert "stage sft: ZeRO 1, remat none, 1 micro-batch of 4 rows a device" in done.stdout
  assert "all-reduce" in done.stdout
  assert "fits: the chip has" in done.stdout
  assert "not estimated" in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 100
  numbers = json.loads(path.read_text())
  assert numbers["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  assert numbers["tokens"] == 32 * 256
  assert numbers["parameters"]["vision"]["trained"] == 0
  assert numbers["parameters"]["language"]["trained"] == numbers["parameters"]["language"]["all"]
  assert numbers["fits"]
  assert numbers["seconds"] is None
  program = numbers["programs"]["training step"]
  resident = numbers["resident_device_bytes"]
  assert program["total"] == numbers["device_bytes"] > sum(resident.values())
  assert program["traffic"]["all-reduce"]["bytes"] > 0
  assert 8 * program["flops"] > 0.9 * numbers["model_flops"] > 0
  # ZeRO 1 splits the two moments over fsdp=4, if their sizes divide.
  trained = resident["trained parameters"]
  assert trained / 2 < resident["optimizer"] < 1.5 * trained


@pytest.mark.slow
def test_a_tpu_slice(directory):
  """Compiles for TPUs on any machine."""
  done = _plan(
    f"--config.model.init_from={directory}",
    "--topology=v5e:2x2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.mesh.zero_stage=3",
  )
  assert done.returncode == 0, done.stderr
  assert "v5e:2x2: 4 x TPU v5e, mesh data=1 x fsdp=4 x tensor=1" in done.stdout
  assert "kernel calls a step compute attention" in done.stdout
  assert "the chip has 15.75" in done.stdout
  assert "a step takes about" in done.stdout
  # The log says only that products are exact, which kernels compute attention, and why not others.
  precision, *kernels = [line.split("] ", 1)[1] for line in done.stderr.strip().splitlines()]
  assert "model.dtype=float32: products are computed in full precision" in precision
  assert kernels == [
    "attention of pictures: splash (cudnn needs an NVIDIA GPU)",
    "attention of rows: splash (cudnn needs an NVIDIA GPU)",
  ]
  assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_mistake_ends_in_one_line():
  done = _plan("--topology=cpu:8")
  assert done.returncode == 1
  assert (
    "the config names no model: give config.model.init_from, or config.model.arch" in done.stderr
  )
  assert done.stderr.count("\n") == 1


def test_configs_that_no_run_can_have_are_refused():
  small.check(small.config())
  with pytest.raises(InputError, match="--config is missing"):
    small.check(None)
  with pytest.raises(InputError, match="a config of the stage 'spt'; give one of sft, reward"):
    small.check(small.config(stage="spt"))
  with pytest.raises(InputError, match="config.model.remat is 'some'; choose from none, full"):
    small.check(small.config(model__remat="some"))
  with pytest.raises(InputError, match="config.model.architecture is 'llama'; choose from llava15"):
    small.model_config(small.config(model__architecture="llama"))


@pytest.fixture(scope="module")
def cpu():
  return topology.open_topology("cpu:1")


@pytest.mark.parametrize("stage", [sft, reward, dpo])
def test_presets_have_published_sizes(cpu, stage):
  """Holds 2 bytes a frozen weight, 12 a trained one, and 2 more if the step has a reference."""
  for preset in stage.PRESETS:
    config = stage.get_config(preset)
    small.check(config)
    if preset == "demo":
      continue
    config.mesh.tensor = 1
    plan = small.plan(config, small.model_config(config), cpu)
    every, trained = (sum(x[key] for x in plan.parameters.values()) for key in ("all", "trained"))
    assert every > 6e9
    others = ("batch", "reference")
    model = sum(size for name, size in plan.resident.items() if name not in others)
    assert model == pytest.approx(2 * (every - trained) + 12 * trained, rel=1e-3)
    assert plan.resident.get("reference", 0) in (0, 2 * trained)


def test_a_row_of_the_docs_table_is_made_of_the_json():
  program = {"times": 2, "flops": 3e12, "bytes_accessed": 5e9, "seconds": 7.4}
  program |= {"traffic": {"all-gather": {"count": 1, "bytes": 2e9}}, "device_bytes": 8 * GIB}
  program |= {"time": {"total": 1.5, "bound": "compute"}}
  plan = {"programs": {"training step": program}, "topology": "v5e:2x2", "utilization": 0.5}
  plan |= {"mesh": {"data": 1, "fsdp": 4}, "device_bytes": 9 * GIB, "seconds": 3.0}
  plan |= {"chip": {"memory": 16 * GIB}}
  cells = dict(zip(plans.COLUMNS, plans.row("sft.py:x", plan), strict=True))
  assert cells["GiB a device"] == "9.00"
  assert (cells["TFLOP"], cells["GB accessed"], cells["GB sent"]) == ("6", "10", "4")
  assert (cells["seconds a step"], cells["bound by"], cells["MFU"]) == ("3.0", "compute", "50%")


def test_rows_of_a_step(cpu):
  config = small.config(batch_size=10, grad_accumulation=2)
  plan = small.plan(config, small.model(), cpu, examples_per_row=3)
  assert plan.tokens == 4 * 64
  assert "10 examples, 3 a row of 64 tokens with 3 images: 4 rows" in plan.assumptions
  assert "2 micro-batches of 2 rows a device" in plan.summary[0]
  assert small.plan(config, small.model(), cpu).tokens == 10 * 64
  config.data.pack = False
  with pytest.raises(InputError, match="more only with config.data.pack"):
    small.plan(config, small.model(), cpu, examples_per_row=3)
  config.data.pack, config.data.max_images = True, 9
  with pytest.raises(InputError, match="9 images of 16 tokens do not fit into rows of"):
    small.plan(config, small.model(), cpu)


def test_pictures_of_several_tiles(cpu):
  """A picture has the most tiles that it may have, if the config does not limit them."""
  model = dataclasses.replace(small.model(), most_tiles=3)
  plan = small.plan(small.config(batch_size=4), model, cpu)
  assert "4 examples, 1 a row of 64 tokens with 3 tiles: 4 rows" in plan.assumptions
  with pytest.raises(InputError, match="6 tiles of 16 tokens do not fit into rows of"):
    small.plan(small.config(), model, cpu, examples_per_row=2)


def test_answers_and_adapters_that_no_run_can_have(cpu):
  config = small.config("dpo", data__max_candidates=4)
  for answers in (1, 5):
    with pytest.raises(
      InputError, match=f"--answers={answers}: at least 2, and at most config.data"
    ):
      small.plan(config, small.model(), cpu, answers=answers)
  config = dpo.get_config("llava15_7b_lora")
  config.lora.targets = "language/layer/"
  with pytest.raises(InputError, match="config.lora.targets, 'language/layer/', is found in none"):
    small.model_config(config)


def test_a_program_that_is_too_large(cpu):
  """The report names the program, and has the compiler's message if it refuses one."""
  plan = small.plan(small.config(), small.model(), cpu)
  compiled = Compiled(1.0, 3 * GIB, arguments=GIB, temporaries=2 * GIB)
  tight = dataclasses.replace(cpu, chip=chips.Chip("small", 2 * GIB, 1e12, 1e12, 1e12))
  for refused in ("", "XLA:TPU compile permanent error. Ran out of memory"):
    compiled = dataclasses.replace(compiled, refused=refused)
    program = dataclasses.replace(plan.programs[0], compiled=compiled)
    large = dataclasses.replace(plan, topology=tight, programs=(program,))
    text = report.as_text(large)
    assert not large.fits
    assert "DOES NOT FIT: the chip has 2.00, training step takes 3.00; 1.00 too few (50%)" in text
    assert (f"the compiler of the training step: {refused}" in text) == bool(refused)
