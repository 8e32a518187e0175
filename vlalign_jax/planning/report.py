"""A plan as text and as JSON."""

import dataclasses
import textwrap

from vlalign_jax.planning import roofline
from vlalign_jax.planning.chips import GIB
from vlalign_jax.planning.step_plan import StepPlan

_gib = lambda size: f"{size / GIB:,.2f}"  # noqa: E731


def as_json(plan: StepPlan) -> dict:
  """Returns all numbers of a plan; bytes and FLOPs are of one device, but for model_flops."""
  programs = {
    program.name: dataclasses.asdict(program.compiled)
    | {
      "times": program.times,
      "device_bytes": plan.total(program),
      "time": program.time
      and dataclasses.asdict(program.time)
      | {"total": program.time.total, "bound": program.time.bound},
    }
    for program in plan.programs
  }
  return {
    "topology": plan.topology.name,
    "chip": dataclasses.asdict(plan.topology.chip),
    "devices": plan.mesh.size,
    "mesh": dict(plan.mesh.shape),
    "parameters": plan.parameters,
    "tokens": plan.tokens,
    "resident_device_bytes": plan.resident,
    "programs": programs,
    "device_bytes": plan.total(plan.largest),
    "fits": plan.fits,
    "seconds": plan.seconds,
    "model_flops": plan.model_flops,
    "utilization": plan.utilization,
    "assumptions": _assumptions(plan),
  }


def as_text(plan: StepPlan) -> str:
  """Returns the report that scripts/plan.py prints."""
  axes = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items())
  head = f"{plan.topology.name}: {plan.mesh.size} x {plan.topology.chip.name}, mesh {axes}"
  note = [plan.topology.note] if plan.topology.note else []
  assumed = ["assumed", *(_fill(line, "  - ", "    ") for line in _assumptions(plan))]
  sections = [
    "\n".join([head, *plan.summary, *note]),
    _parameters(plan),
    _programs(plan),
    _collectives(plan),
    _bytes(plan),
    _time(plan),
    "\n".join(assumed),
  ]
  return "\n\n".join(filter(None, sections))


def _fill(text: str, first: str = "", later: str = "  ") -> str:
  return textwrap.fill(" ".join(text.split()), 98, initial_indent=first, subsequent_indent=later)


def _table(rows: list[list[str]]) -> str:
  """Returns columns, the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *others in rows:
    cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
    lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
  return "\n".join(lines)


def _assumptions(plan: StepPlan) -> list[str]:
  kernels = any(program.compiled.kernels for program in plan.programs)
  lines = [*plan.assumptions, "FLOPs: products and convolutions, attention over whole rows"]
  lines += ["attention kernels: operations by their shapes, half of a causal mask"] * kernels
  return lines + [roofline.ASSUMPTION] * (plan.seconds is not None)


def _parameters(plan: StepPlan) -> str:
  rows = [["million parameters", *plan.parameters, "sum"]]
  for kind in ("all", "trained"):
    numbers = [part[kind] / 1e6 for part in plan.parameters.values()]
    rows.append([f"  {kind}", *(f"{number:,.1f}" for number in (*numbers, sum(numbers)))])
  return _table(rows)


def _programs(plan: StepPlan) -> str:
  rows = [["compiled, one device", "times", "TFLOP", "GB accessed", "GB sent", "seconds"]]
  for program in plan.programs:
    done = program.compiled
    numbers = f"{done.flops / 1e12:,.2f}", f"{done.bytes_accessed / 1e9:,.1f}"
    time = "-" if program.time is None else f"{program.time.total:,.2f}"
    sent = f"{done.sent / 1e9:,.2f}"
    rows.append([f"  {program.name}", f"{program.times}", *numbers, sent, time])
  kernels = sum(program.times * program.compiled.kernels for program in plan.programs)
  said = f"  {kernels:,} kernel calls a step compute attention"
  return "\n".join([_table(rows)] + [said] * (kernels > 0))


def _collectives(plan: StepPlan) -> str:
  kinds: dict[str, list[float]] = {}
  for program in plan.programs:
    for kind, traffic in program.compiled.traffic.items():
      total = kinds.setdefault(kind, [0, 0.0])
      total[0] += program.times * traffic.count
      total[1] += program.times * traffic.bytes
  if not kinds:
    return "" if plan.refused else "no collectives"
  rows = [["collectives, one device", "times a step", "GiB sent"]]
  for kind, (count, size) in sorted(kinds.items(), key=lambda item: -item[1][1]):
    rows.append([f"  {kind}", f"{count:,}", _gib(size)])
  return _table(rows)


def _bytes(plan: StepPlan) -> str:
  rows = [["GiB a device", ""]]
  rows += [[f"  {name}", _gib(size)] for name, size in plan.resident.items()]
  rows.append(["  = resident", _gib(sum(plan.resident.values()))])
  for program in plan.programs:
    if program.compiled.refused:
      rows.append([f"  {program.name}: refused at", _gib(program.compiled.total)])
    else:
      rows.append([f"  {program.name}: temporaries", _gib(program.compiled.temporaries)])
      rows.append([f"  {program.name}: in all", _gib(plan.total(program))])
  available, needed = plan.topology.chip.memory, plan.total(plan.largest)
  left = available - needed
  share = (
    f"{_gib(abs(left))} {'are left' if left >= 0 else 'too few'} ({abs(left) / available:.0%})"
  )
  verdict = "fits" if plan.fits else "DOES NOT FIT"
  lines = [
    _table(rows),
    f"  {verdict}: the chip has {_gib(available)}, {plan.largest.name} takes "
    f"{_gib(needed)}; {share}",
  ]
  for program in plan.refused:
    said = f"the compiler of the {program.name}: {program.compiled.refused}"
    lines.append(_fill(said, "  ", "    "))
  return "\n".join(lines)


def _time(plan: StepPlan) -> str:
  if plan.topology.chip.flops is None:
    return "time: not estimated, CPUs differ too much"
  if plan.seconds is None:
    return "time: not estimated, as the compiler refuses a program"
  head = f"a step takes about {plan.seconds:,.2f} s: {plan.tokens / plan.seconds:,.0f} tokens/s"
  if plan.utilization is not None:
    head += f", {plan.utilization:.0%} of the chips' FLOP/s for the model (MFU)"
  rows = [["seconds a step", "compute", "memory", "interconnect", "bound by"]]
  for program in plan.programs:
    time = program.time
    parts = (program.times * part for part in (time.compute, time.memory, time.interconnect))
    rows.append([f"  {program.name}", *(f"{part:,.2f}" for part in parts), time.bound])
  return "\n".join([head, _table(rows)])
