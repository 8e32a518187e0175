"""A plan as text, and as what JSON can hold."""

import dataclasses
import textwrap

from vlalign_jax import trees
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.planning import roofline
from vlalign_jax.planning.chips import GIB
from vlalign_jax.planning.planner import Plan

PARTS = ("vision", "projector", "language", "score")


def parameters(plan: Plan) -> dict[str, dict[str, int]]:
  """Part -> number of parameters, and how many of them are trained."""
  return {
    part: {
      "all": trees.size(plan.program.params.get(part, {})),
      "trained": trees.size(plan.program.state.params.get(part, {})),
    }
    for part in PARTS
    if part in plan.program.params
  }


def as_json(plan: Plan) -> dict:
  """All numbers of a plan; bytes and FLOPs are of one device where the key says so."""
  done, config = plan.compiled, plan.config
  chip = plan.topology.chip
  return {
    "topology": plan.topology.name,
    "chip": dataclasses.asdict(chip),
    "devices": plan.mesh.size,
    "mesh": dict(plan.mesh.shape),
    "zero_stage": config.mesh.zero_stage,
    "remat": config.model.remat,
    "grad_accumulation": config.grad_accumulation,
    "rows": plan.work.rows,
    "tokens": plan.work.tokens,
    "parameters": parameters(plan),
    "device_bytes": dataclasses.asdict(plan.memory)
    | {"minimum": plan.memory.minimum, "estimate": plan.memory.estimate},
    "compiled": None if done is None else dataclasses.asdict(done),
    "total_device_bytes": plan.total,
    "over_minimum": plan.total / plan.memory.minimum,
    "fits": plan.fits,
    "flops": {part: dataclasses.asdict(work) for part, work in plan.operations.items()},
    "device_flops": plan.device_flops,
    "seconds": None
    if plan.time is None
    else dataclasses.asdict(plan.time) | {"step": plan.time.step, "bound": plan.time.bound},
    "assumptions": assumptions(plan),
  }


def assumptions(plan: Plan) -> list[str]:
  """What the numbers rest on, in sentences."""
  said = [*plan.work.assumptions]
  over = ", the head over all tokens (it runs over learnt ones)"
  said.append(f"FLOPs: attention over whole rows{over * (plan.model.head != SCORE)}")
  if plan.time:
    said.append(roofline.ASSUMPTION)
  return said


def text(plan: Plan) -> str:
  """The report that scripts/plan.py prints."""
  sections = (_head, _parameters, _bytes, _flops, _collectives, _time, _assumptions)
  return "\n\n".join(filter(None, (section(plan) for section in sections)))


def _head(plan: Plan) -> str:
  config, mesh = plan.config, plan.mesh
  axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
  how = (
    f"ZeRO {config.mesh.zero_stage}, remat {config.model.remat}, "
    f"{plan.work.accumulation} micro-batch{'es' * (plan.work.accumulation > 1)} of "
    f"{plan.work.device_rows} row{'s' * (plan.work.device_rows > 1)} a device"
  )
  lines = [
    f"{plan.topology.name}: {mesh.size} x {plan.topology.chip.name}, mesh {axes}",
    f"stage {config.stage}: {how}",
  ]
  if plan.topology.note:
    lines.append(plan.topology.note)
  return "\n".join(lines)


def table(rows: list[list[str]], indent: str = "  ") -> str:
  """Columns, the first to the left, the others to the right."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = []
  for first, *others in rows:
    cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
    lines.append("  ".join([f"{indent}{first:<{widths[0]}}", *cells]).rstrip())
  return "\n".join(lines)


def _parameters(plan: Plan) -> str:
  counts = parameters(plan)
  rows = [["million parameters", *counts, "all"]]
  for kind in ("all", "trained"):
    numbers = [part[kind] / 1e6 for part in counts.values()]
    rows.append([f"  {kind}", *(f"{number:,.1f}" for number in (*numbers, sum(numbers)))])
  return table(rows, "")


def _bytes(plan: Plan) -> str:
  needed, done, available = plan.memory, plan.compiled, plan.topology.chip.memory
  gib = lambda size: f"{size / GIB:,.2f}"  # noqa: E731
  rows = [
    ["GiB a device", "formula", "compiler"],
    ["  parameters", gib(needed.params), ""],
    ["  optimizer", gib(needed.optimizer), ""],
    ["  gradients", gib(needed.gradients), ""],
    ["  saved for the backward pass", gib(needed.residuals), ""],
    ["  one layer, gathered", gib(needed.gathered), ""],
    ["  = minimum", gib(needed.minimum), ""],
    ["  working memory", gib(needed.working), ""],
    ["  = total", gib(needed.estimate), gib(done.total) if done else "-"],
  ]
  if done and not done.refused:
    rows[1][2] = f"arguments {gib(done.arguments)}"
    rows[3][2] = f"temporaries {gib(done.temporaries)}"
  lines = [table(rows, "")]
  if "reference" in plan.program.frozen:
    lines.append(f"  of the parameters, the reference's copy is {gib(needed.reference)}")
  if needed.host:
    lines.append(f"  {gib(needed.host)} GiB of the optimizer are in host memory")
  if done:
    lines.append(f"  the compiler's total is {plan.total / needed.minimum:.2f} x the minimum")
  left = available - plan.total
  lines.append(
    f"  {'fits' if plan.fits else 'DOES NOT FIT'}: the chip has {gib(available)}, "
    + (f"{gib(left)} are left" if plan.fits else f"{gib(-left)} too few")
    + f" ({abs(left) / available:.0%})"
  )
  if done and done.refused:
    lines.append(
      textwrap.fill(
        f"the compiler: {done.refused}", 98, initial_indent="  ", subsequent_indent="    "
      )
    )
  return "\n".join(lines)


def _flops(plan: Plan) -> str:
  tera = lambda number: f"{number / 1e12:,.1f}" if number else "-"  # noqa: E731
  rows = [["TFLOP a step, all devices", "forward", "backward", "recomputed", "all"]]
  for part, work in plan.operations.items():
    parts = (work.forward, work.backward, work.recomputed, work.total)
    rows.append([f"  {part}", *map(tera, parts)])
  columns = [
    sum(getattr(work, name) for work in plan.operations.values())
    for name in ("forward", "backward", "recomputed", "total")
  ]
  rows.append(["  = total", *map(tera, columns)])
  lines = [table(rows, "")]
  done = plan.compiled
  if done and not done.refused:
    counted, without = plan.device_flops, ""
    if done.kernels:
      counted -= plan.operations["attention"].total / plan.mesh.size
      without = f" without attention ({done.kernels:,} kernel calls)"
    lines.append(
      f"  one device{without}: {tera(counted)} by formula, {tera(done.flops)} compiled "
      f"({done.flops / counted:.2f} x)"
    )
    lines.append(
      "  compiled: products, each as often as its loops run; the compiler's own count, in which\n"
      f"  a loop's body counts once, is {tera(done.counted_once)}"
    )
  return "\n".join(lines)


def _collectives(plan: Plan) -> str:
  done = plan.compiled
  if not done or done.refused:
    return ""
  if not done.traffic:
    return "no collectives"
  rows = [["collectives, one device", "times a step", "GiB sent"]]
  for kind, traffic in sorted(done.traffic.items(), key=lambda item: -item[1].bytes):
    rows.append([f"  {kind}", f"{traffic.count:,}", f"{traffic.bytes / GIB:,.2f}"])
  return table(rows, "")


def _time(plan: Plan) -> str:
  if plan.time is None:
    return "time: not estimated, CPUs differ too much"
  time = plan.time
  speed = plan.work.tokens / time.step
  busy = plan.device_flops / (time.step * plan.topology.chip.flops)
  return (
    f"a step takes about {time.step:.2f} s: {speed:,.0f} tokens/s, {busy:.0%} of the chips' FLOP/s "
    f"(bound by {time.bound})\n"
    f"  compute {time.compute:.2f} s, memory {time.memory:.2f} s, "
    f"interconnect {time.interconnect:.2f} s"
  )


def _assumptions(plan: Plan) -> str:
  return "\n".join(["assumed", *(f"  - {sentence}" for sentence in assumptions(plan))])
