"""The fastest settings that fit: ranked by formula, then put to the compiler."""

import copy
import math
from collections.abc import Callable, Iterator

from vlalign_jax.errors import InputError
from vlalign_jax.models.stack import REMAT_NAMES
from vlalign_jax.planning import planner
from vlalign_jax.planning.chips import GIB
from vlalign_jax.planning.planner import Plan
from vlalign_jax.sharding import mesh as meshes

# Compiling a large model takes minutes.
MOST_COMPILATIONS = 3
SHOWN = 8
KEYS = (
  "mesh.zero_stage",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
  "model.remat",
  "grad_accumulation",
)


def settings(config, model, topology) -> Iterator:
  """Configs to try: every ZeRO stage, tensor size, remat and number of micro-batches that divides.

  Rows are split over mesh.data as the config says (1 where it leaves that open), and over
  mesh.fsdp, which gets the rest.
  """
  heads = math.gcd(model.language.heads, model.language.kv_heads)
  data = max(1, config.mesh.data)
  count = len(topology.devices)
  for tensor in range(1, heads + 1):
    if heads % tensor or count % (tensor * data):
      continue
    blocks = count // tensor
    for stage in (0, 1, 2, 3):
      for remat in REMAT_NAMES:
        for micro in range(1, config.batch_size // blocks + 1):
          if config.batch_size % (blocks * micro) and (not config.data.pack or micro & (micro - 1)):
            continue
          tried = copy.deepcopy(config)
          tried.mesh.update(zero_stage=stage, data=data, fsdp=-1, tensor=tensor)
          tried.model.remat, tried.grad_accumulation = remat, micro
          yield tried


def candidates(config, model, topology, examples_per_row: int, answers: int = 2) -> list[Plan]:
  """Plans by formula of all settings, the fastest first; of equally fast ones the smallest."""
  programs, plans = {}, []
  for tried in settings(config, model, topology):
    # Neither remat nor micro-batches change what is held where.
    key = (tried.mesh.zero_stage, tried.mesh.tensor)
    if key not in programs:
      mesh = meshes.make_mesh(tried.mesh, topology.devices)
      programs[key] = planner.build(tried, model, mesh)
    plans.append(planner.plan(tried, model, topology, examples_per_row, answers, programs[key]))
  if not plans:
    raise InputError(
      f"config.batch_size={config.batch_size} fills {len(topology.devices)} devices in no way; "
      "raise it"
    )
  plans.sort(key=lambda plan: (_seconds(plan), plan.memory.estimate))
  return _without_doubles(plans)


def _without_doubles(plans: list[Plan]) -> list[Plan]:
  """Less those that differ in remat alone, and in nothing that counts."""
  kept = {}
  for plan in plans:
    mesh = plan.config.mesh
    settings = (mesh.zero_stage, mesh.tensor, plan.work.accumulation)
    kept.setdefault((*settings, _seconds(plan), plan.memory.estimate), plan)
  return list(kept.values())


def _seconds(plan: Plan) -> float:
  """Of a step; where the chip's speed is not known, FLOPs stand for it."""
  return plan.device_flops if plan.time is None else plan.time.step


def search(
  config,
  model,
  topology,
  examples_per_row: int,
  show: Callable[[str], None],
  answers: int = 2,
) -> Plan:
  """The fastest plan that fits, by the compiler's word where there is a compiler.

  Args:
    config: of the run.
    model: the architecture.
    topology: the devices.
    examples_per_row: how many examples packing puts into a row.
    show: takes lines of text.
    answers: ranked answers of an example, where the stage learns from such.

  Raises:
    InputError: nothing fits; names the smallest.
  """
  plans = candidates(config, model, topology, examples_per_row, answers)
  available = topology.chip.memory
  fitting = [plan for plan in plans if plan.memory.estimate <= available]
  show(f"{len(plans)} settings, {len(fitting)} of them fit by formula; the fastest:")
  for plan in (fitting or plans)[:SHOWN]:
    show(f"  {line(plan)}")
  if not topology.compiles and fitting:
    return _announce(fitting[0], show)
  # What the compiler takes, over what the formula says: at first it is believed.
  factor, tried = 1.0, []
  while topology.compiles and len(tried) < MOST_COMPILATIONS:
    left = [
      plan for plan in plans if plan not in tried and plan.memory.estimate * factor <= available
    ]
    if not left:
      break
    show(f"compiling {line(left[0])}")
    done = planner.compile_plan(left[0])
    show(
      f"  {done.total / GIB:.2f} GiB in {done.compiled.seconds:.0f} s: "
      + ("fits" if done.fits else "does not fit")
    )
    if done.fits:
      return _announce(done, show)
    tried.append(left[0])
    factor = max(factor, done.total / left[0].memory.estimate) * 1.02
  smallest = min(plans, key=lambda plan: plan.memory.estimate)
  raise InputError(
    f"nothing was found that fits {topology.name} ({available / GIB:.2f} GiB a device); the "
    f"smallest by formula: {line(smallest)}"
  )


def line(plan: Plan) -> str:
  """A plan's settings with its time and bytes."""
  config = plan.config
  time = "" if plan.time is None else f"{plan.time.step:7.2f} s ({plan.time.bound})"
  return (
    f"ZeRO {config.mesh.zero_stage}, tensor {config.mesh.tensor:2}, "
    f"{config.grad_accumulation:3} micro-batches, remat {config.model.remat:19} "
    f"{plan.memory.estimate / GIB:8.2f} GiB  {time}"
  )


def flags(plan: Plan) -> str:
  """The settings of a plan as flags to paste."""

  def value(key):
    holder = plan.config
    for part in key.split("."):
      holder = holder[part]
    return holder

  return " ".join(f"--config.{key}={value(key)}" for key in KEYS)


def _announce(plan: Plan, show: Callable[[str], None]) -> Plan:
  show(f"\nthe fastest that fits:\n  {flags(plan)}\n")
  return plan
