"""A plan of PPO as text, and as what JSON can hold."""

import dataclasses
import textwrap

from vlalign_jax.planning import report, roofline
from vlalign_jax.planning.chips import GIB
from vlalign_jax.planning.ppo import Plan

_gib = lambda size: f"{size / GIB:,.2f}"  # noqa: E731


def as_json(plan: Plan) -> dict:
  """All numbers of a plan; bytes are of one device."""
  phases = {
    phase.name: {
      "times": phase.times,
      "temporaries": phase.temporaries,
      "total": plan.total(phase),
      "flops": phase.operations,
      "seconds": None
      if phase.time is None
      else dataclasses.asdict(phase.time) | {"step": phase.time.step, "bound": phase.time.bound},
      "compiled": None if phase.compiled is None else dataclasses.asdict(phase.compiled),
    }
    for phase in plan.phases
  }
  return {
    "topology": plan.topology.name,
    "chip": dataclasses.asdict(plan.topology.chip),
    "devices": plan.mesh.size,
    "mesh": dict(plan.mesh.shape),
    "held_device_bytes": plan.held,
    "rollout_device_bytes": plan.rollout,
    "cache_device_bytes": plan.cache,
    "phases": phases,
    "total_device_bytes": plan.total(plan.largest),
    "fits": plan.fits,
    "seconds": plan.seconds,
    "assumptions": _assumptions(plan),
  }


def text(plan: Plan) -> str:
  """The report that scripts/plan.py prints."""
  indents = {"initial_indent": "  - ", "subsequent_indent": "    "}
  filled = (textwrap.fill(" ".join(x.split()), 98, **indents) for x in _assumptions(plan))
  said = "\n".join(["assumed", *filled])
  return "\n\n".join([_head(plan), _held(plan), _phases(plan), _verdict(plan), _time(plan), said])


def _assumptions(plan: Plan) -> list[str]:
  by_formula = "bytes by formula are an estimate, not a bound"
  if all(phase.compiled for phase in plan.phases):
    by_formula = "the verdict rests on the compiler's bytes, not on the formula's"
  said = [*plan.assumptions, by_formula]
  if plan.seconds is not None:
    said.append(roofline.ASSUMPTION)
  return said


def _head(plan: Plan) -> str:
  config, ppo = plan.config, plan.config.ppo
  axes = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items())
  stages = [
    f"{role} ZeRO {config.mesh.zero_stage if stage is None else stage}"
    for role, stage in (("actor", ppo.actor_zero_stage), ("critic", ppo.critic_zero_stage))
    if role == "actor" or plan.program.critic
  ]
  lines = [
    f"{plan.topology.name}: {plan.mesh.size} x {plan.topology.chip.name}, mesh {axes}",
    f"stage ppo ({ppo.estimator}): {', '.join(stages)}, remat {config.model.remat}",
    f"sampled in {ppo.sample_parts} part{'s' * (ppo.sample_parts > 1)}; "
    f"{ppo.epochs} x {ppo.minibatches} updates, micro-batches of each: {config.grad_accumulation}",
  ]
  return "\n".join(lines + [plan.topology.note] * bool(plan.topology.note))


def _held(plan: Plan) -> str:
  rows = [["GiB a device, all the time", ""]]
  rows += [[f"  {name}", _gib(size)] for name, size in plan.held.items()]
  rows += [["  rows of a rollout", _gib(plan.rollout)]]
  rows += [["  = held", _gib(sum(plan.held.values()) + plan.rollout)]]
  return report.table(rows, "")


def _phases(plan: Plan) -> str:
  rows = [["programs of a step", "times", "TFLOP", "seconds", "formula", "compiler", "with held"]]
  for phase in plan.phases:
    done = phase.compiled
    told = "-" if done is None else "refused" if done.refused else _gib(phase.needed)
    seconds = "-" if phase.time is None else f"{phase.time.step:,.2f}"
    total = f"{phase.operations / 1e12:,.1f}"
    beside = _gib(phase.temporaries), told, _gib(plan.total(phase))
    rows.append([f"  {phase.name}", f"{phase.times}", total, seconds, *beside])
  lines = [
    report.table(rows, ""),
    "  TFLOP of all devices and seconds, one time; GiB a device: beside what is held, and with it",
    f"  keys and values while sampling: {_gib(plan.cache)} GiB a device",
  ]
  return "\n".join(lines)


def _verdict(plan: Plan) -> str:
  available, largest = plan.topology.chip.memory, plan.largest
  left = available - plan.total(largest)
  lines = [
    f"{'fits' if plan.fits else 'DOES NOT FIT'}: the chip has {_gib(available)}, {largest.name} "
    f"takes {_gib(plan.total(largest))}, the most"
    + (f"; {_gib(left)} are left ({left / available:.0%})" if left >= 0 else "")
  ]
  for phase in plan.phases:
    if phase.compiled and phase.compiled.refused:
      said = f"the compiler of {phase.name}: {phase.compiled.refused}"
      indents = {"initial_indent": "  ", "subsequent_indent": "    "}
      lines.append(textwrap.fill(said, 98, **indents))
  return "\n".join(lines)


def _time(plan: Plan) -> str:
  if plan.seconds is None:
    return "time: not estimated, CPUs differ too much"
  bounds = ", ".join(
    f"{phase.name} {phase.times * phase.time.step:,.1f} s ({phase.time.bound})"
    for phase in plan.phases
  )
  said = f"a step takes about {plan.seconds:,.1f} s: {bounds}"
  return textwrap.fill(said, 98, subsequent_indent="  ")
