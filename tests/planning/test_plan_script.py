"""scripts/plan.py as users start it, on a tiny model; and its report."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import dpo, reward, sft
from tests import checkpoints
from tests.planning import small
from vlalign_jax.errors import InputError
from vlalign_jax.planning import planner, report, search, topology
from vlalign_jax.planning.chips import GIB

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("llava"))
  checkpoints.make_llava(directory)
  return directory


def _plan(*arguments, stage="sft", preset="demo"):
  """What `python scripts/plan.py` prints; with the demo's preset in a fraction of its time."""
  # As users have it: nothing keeps JAX to the CPU but the script.
  kept = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
  command = [sys.executable, "scripts/plan.py", f"--config=configs/{stage}.py:{preset}", *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept)


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
  assert "stage sft: ZeRO 1, remat none, 1 micro-batch of 8 rows a device" in done.stdout
  assert "all-reduce" in done.stdout
  assert "fits: the chip has" in done.stdout
  assert "not estimated" in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 100
  numbers = json.loads(path.read_text())
  assert numbers["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  assert numbers["rows"] == 64
  assert numbers["parameters"]["vision"]["trained"] == 0
  assert numbers["parameters"]["language"]["trained"] == numbers["parameters"]["language"]["all"]
  assert numbers["fits"]
  assert numbers["seconds"] is None
  device, compiled = numbers["device_bytes"], numbers["compiled"]
  assert compiled["total"] == numbers["total_device_bytes"] > device["minimum"]
  assert device["params"] > device["gradients"] > device["params"] / 2  # the vision tower has none
  assert compiled["traffic"]["all-reduce"]["bytes"] > 0


def test_a_tpu_slice(directory):
  """The compiler for TPUs, on whatever machine this is."""
  done = _plan(
    f"--config.model.init_from={directory}",
    "--topology=v5e:2x2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.mesh.zero_stage=3",
  )
  assert done.returncode == 0, done.stderr
  assert "v5e:2x2: 4 x TPU v5e, mesh data=1 x fsdp=4 x tensor=1" in done.stdout
  assert "kernel calls" in done.stdout  # attention's
  assert "the chip has 15.75" in done.stdout
  assert "a step takes about" in done.stdout
  assert not done.stderr.strip(), done.stderr
  assert max(map(len, done.stdout.splitlines())) <= 100


def test_ppo(tmp_path):
  path = tmp_path / "plan.json"
  given = ("--topology=gpu:h100x1", f"--json={path}")
  done = _plan(*given, stage="ppo", preset="llava15_7b_lora")
  assert done.returncode == 0, done.stderr
  assert "fits: the chip has 60.00, sampling takes" in done.stdout
  numbers = json.loads(path.read_text())
  assert numbers["fits"]
  assert list(numbers["phases"]) == [
    *("pictures", "sampling", "reference", "reward model", "values", "update")
  ]
  done = _plan(*given, "--search", stage="ppo", preset="llava15_7b_lora")
  assert done.returncode == 1
  assert "--search knows no PPO" in done.stderr


def test_search(directory):
  done = _plan(
    f"--config.model.init_from={directory}",
    "--topology=cpu:2",
    "--search",
    "--config.batch_size=4",
    "--config.data.pack=false",
  )
  assert done.returncode == 0, done.stderr
  settings, _, plan = done.stdout.partition("the fastest that fits:\n")
  assert "settings, " in settings
  assert "compiling ZeRO" in settings
  flags = plan.strip().splitlines()[0].split()
  assert [flag.partition("=")[0] for flag in flags] == [f"--config.{key}" for key in search.KEYS]
  assert "fits: the chip has" in plan


def test_a_mistake_ends_in_one_line():
  done = _plan("--topology=cpu:8")
  assert done.returncode == 1
  assert (
    "the config names no model: give config.model.init_from, or config.model.arch" in done.stderr
  )
  assert done.stderr.count("\n") == 1


def test_what_no_run_can_have_is_refused():
  planner.check(small.config())
  with pytest.raises(InputError, match="--config is missing"):
    planner.check(None)
  with pytest.raises(InputError, match="config.stage is 'spt', which .*choose from sft, reward"):
    planner.check(small.config(stage="spt"))
  with pytest.raises(InputError, match="config.model.remat is 'some'; choose from none, full"):
    planner.check(small.config(model__remat="some"))
  with pytest.raises(InputError, match="config.model.architecture is 'llama'; choose from llava15"):
    planner.model_config(small.config(model__architecture="llama"))


@pytest.fixture(scope="module")
def gpu():
  return topology.open_topology("gpu:h100x1")


@pytest.mark.parametrize("stage", [sft, reward, dpo])
def test_presets_have_published_sizes(gpu, stage):
  for preset in stage.PRESETS:
    config = stage.get_config(preset)
    planner.check(config)
    if preset != "demo":
      config.mesh.tensor = 1
      plan = planner.plan(config, planner.model_config(config), gpu)
      assert not plan.fits  # whole on one GPU
      assert "DOES NOT FIT" in report.text(plan)


def test_bytes_of_stages_and_adapters_by_formula(gpu):
  """2 bytes a weight with adapters, 16 a trained one; a reference in the step is 2 more."""

  def held(stage, preset, **settings):
    config = stage.get_config(preset)
    config.batch_size = 1
    config[config.stage].update(settings)
    plan = planner.plan(config, planner.model_config(config), gpu)
    counts = report.parameters(plan)
    trained, whole = (sum(part[key] for part in counts.values()) for key in ("trained", "all"))
    memory = plan.memory
    found = memory.params + memory.optimizer + memory.gradients
    return plan, found - 16 * trained - 2 * (whole - trained), trained

  plan, left, trained = held(reward, "llava15_7b")
  assert left == pytest.approx(0, abs=1e-4 * plan.memory.params)
  assert report.parameters(plan)["score"] == {"all": 4096, "trained": 4096}
  assert plan.operations["head"].total < 1e-6 * plan.operations["language"].total
  plan, left, trained = held(dpo, "llava15_7b_lora")
  assert left == pytest.approx(0, abs=1e-4 * plan.memory.params)
  assert plan.memory.reference == 0
  assert plan.operations["language"].backward < 1.1 * plan.operations["language"].forward
  plan, left, trained = held(dpo, "llava15_7b", reference="step")
  assert left == pytest.approx(2 * trained, rel=1e-3)
  assert plan.memory.reference == pytest.approx(2 * trained, rel=1e-3)


def test_bytes_of_a_large_model_by_formula(gpu):
  """16 bytes a trained parameter, 2 a frozen one, on one device."""
  config = sft.get_config("llava15_7b")
  config.grad_accumulation = 2
  plan = planner.plan(config, planner.model_config(config), gpu)
  counts = report.parameters(plan)
  trained = sum(part["trained"] for part in counts.values())
  frozen = sum(part["all"] for part in counts.values()) - trained
  held = plan.memory.params + plan.memory.optimizer + plan.memory.gradients
  assert held == pytest.approx(16 * trained + 2 * frozen, rel=1e-6)
  # A hidden state per layer and token, and what the projector saves.
  hidden = 32 * 64 * 2048 * 4096 * 2
  assert hidden < plan.memory.residuals < 1.1 * hidden
  assert plan.memory.gathered == 0  # one device: nothing is split


def test_rows_of_a_step(gpu):
  config = small.config(batch_size=10, grad_accumulation=2)
  plan = planner.plan(config, small.model(), gpu, examples_per_row=3)
  assert (plan.work.rows, plan.work.images, plan.work.device_rows) == (4, 3, 2)
  text = report.text(plan)
  assert "10 examples, 3 a row of 64 tokens with 3 images: 4 rows" in text
  one = planner.plan(config, small.model(), gpu)
  assert one.work.rows == 10
  config.data.pack = False
  with pytest.raises(InputError, match="more only with config.data.pack"):
    planner.plan(config, small.model(), gpu, examples_per_row=3)
  config.data.pack, config.data.max_images = True, 9
  with pytest.raises(InputError, match="9 images of 16 tokens do not fit into rows of"):
    planner.plan(config, small.model(), gpu)


def test_answers_and_adapters_that_no_run_can_have(gpu):
  config = small.config("dpo", data__max_candidates=4)
  for answers in (1, 5):
    with pytest.raises(
      InputError, match=f"--answers={answers}: at least 2, and at most config.data"
    ):
      planner.plan(config, small.model(), gpu, answers=answers)
  config = dpo.get_config("llava15_7b_lora")
  config.lora.targets = "language/layer/"
  with pytest.raises(InputError, match="config.lora.targets, 'language/layer/', is found in none"):
    planner.model_config(config)


def test_search_takes_the_fastest_that_fits_by_formula(gpu):
  config = small.config(train__vision=True)  # else saving all products saves those of weights only
  shown = []
  best = search.search(config, small.model(), gpu, 1, shown.append)
  plans = search.candidates(config, small.model(), gpu, 1)
  assert best.time.step == min(plan.time.step for plan in plans)
  assert {plan.config.model.remat for plan in plans} == set(search.REMAT_NAMES)
  assert {plan.config.grad_accumulation for plan in plans} == {1, 2, 4, 8}
  assert config.mesh.zero_stage == 0  # it is left as it was


def test_search_where_nothing_fits(gpu):
  config = sft.get_config("llama3_70b")
  with pytest.raises(InputError, match=r"nothing was found that fits gpu:h100x1 \(60.00 GiB"):
    search.search(config, planner.model_config(config), gpu, 1, lambda line: None)


def test_search_believes_the_compiler(monkeypatch):
  """A plan that the compiler refuses makes the search choose a smaller one."""
  cpu = topology.open_topology("cpu:1")
  config = small.config(batch_size=32)
  plans = search.candidates(config, small.model(), cpu, 1)
  asked = []

  def refuse_large(plan):
    asked.append(plan)
    done = planner.compiled.Compiled(seconds=1.0, total=3 * plan.memory.estimate)
    return planner.dataclasses.replace(plan, compiled=done)

  monkeypatch.setattr(planner, "compile_plan", refuse_large)
  sizes = sorted(plan.memory.estimate for plan in plans)
  chip = topology.chips.Chip("small", memory=3.5 * sizes[0])
  tight = planner.dataclasses.replace(cpu, chip=chip)
  best = search.search(config, small.model(), tight, 1, lambda line: None)
  assert len(asked) == 2
  assert best.total <= chip.memory < asked[0].memory.estimate * 3
  assert chip.memory < GIB
