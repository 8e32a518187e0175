"""A plan as text and as JSON."""

import dataclasses
import textwrap

from vlalign_jax.planning.step_plan import StepPlan
from vlalign_jax.sharding import roofline
from vlalign_jax.sharding.chips import GIB


def as_json(plan: StepPlan) -> dict:
  """Returns all numbers of a plan; bytes and FLOPs are of one device, except model_flops."""
  programs = {}
  for program in plan.programs:
    time = program.time
    numbers = {"times": program.times, "device_bytes": plan.total(program), "time": None}
    if time:
      numbers["time"] = dataclasses.asdict(time) | {"total": time.total, "bound": time.bound}
    compiled = dataclasses.asdict(program.compiled) if program.compiled else {}
    programs[program.name] = compiled | numbers
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
  assumptions = ["assumed", *(_fill(line, "  - ", "    ") for line in _assumptions(plan))]
  sections = [
    "\n".join([head, *plan.summary, *note]),
    _parameters(plan),
    _programs(plan),
    _collectives(plan),
    _bytes(plan),
    _time(plan),
    "\n".join(assumptions),
  ]
  return "\n\n".join(filter(None, sections))


def _gib(size: float) -> str:
  return f"{size / GIB:,.2f}"


def _fill(text: str, first: str, later: str) -> str:
  return textwrap.fill(" ".join(text.split()), 98, initial_indent=first, subsequent_indent=later)


def _table(rows: list[list[str]]) -> str:
  """Returns lines of columns: the first is aligned to the left, the others to the right."""
  (first, *others) = zip(*rows, strict=True)
  columns = [[cell.ljust(max(map(len, first))) for cell in first]]
  columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
  return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


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
    compiled = program.compiled
    numbers = f"{compiled.flops / 1e12:,.2f}", f"{compiled.bytes_accessed / 1e9:,.1f}"
    numbers += f"{compiled.sent / 1e9:,.2f}", f"{program.time.total:,.2f}" if program.time else "-"
    rows.append([f"  {program.name}", f"{program.times}", *numbers])
  kernels = sum(program.times * program.compiled.kernels for program in plan.programs)
  line = f"\n  {kernels:,} kernel calls a step compute attention"
  return _table(rows) + line * (kernels > 0)


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
  lines = [
    _table(rows),
    f"  {'fits' if plan.fits else 'DOES NOT FIT'}: the chip has {_gib(available)}, "
    f"{plan.largest.name} takes {_gib(needed)}; {_gib(abs(left))} "
    f"{'are left' if left >= 0 else 'too few'} ({abs(left) / available:.0%})",
  ]
  for program in plan.refused:
    message = f"the compiler of the {program.name}: {program.compiled.refused}"
    lines.append(_fill(message, "  ", "    "))
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
