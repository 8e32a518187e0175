"""The table of docs/planning.md: presets compiled by scripts/plan.py for TPUs and GPUs.

  python -m benchmarks.plans [--directory=plans]

Needs requirements-tpu.txt and requirements-gpu-plan.txt. Takes ten minutes or more on two cores.
Each plan is kept in the directory as JSON; what is there already is not compiled again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- written by benchmarks/plans.py -->\n", "<!-- end -->\n"
PLANS = (
  ("sft.py:llava15_7b", "gpu:h100x8"),
  ("sft.py:llava15_7b", "v5e:4x4"),
  ("ppo.py:llava15_7b_lora", "gpu:h100x1"),
)
COLUMNS = (
  *("preset", "devices", "mesh", "GiB a device", "of", "TFLOP", "GB accessed", "GB sent"),
  *("seconds a step", "bound by", "MFU", "compiled in"),
)


def compile_plan(config: str, topology: str, directory: pathlib.Path) -> dict:
  """Returns what scripts/plan.py writes as JSON."""
  path = directory / f"{config}-{topology}.json".replace(":", "_")
  if not path.exists():
    flags = [f"--config=configs/{config}", f"--topology={topology}", f"--json={path}"]
    subprocess.run([sys.executable, "scripts/plan.py", *flags], check=True, cwd=ROOT)
  return json.loads(path.read_text())


def row(config: str, plan: dict) -> list[str]:
  """Returns the cells of a plan; operations and bytes are of one device in a step."""
  programs = plan["programs"]
  total = lambda key: sum(p["times"] * p[key] for p in programs.values())  # noqa: E731
  sent = sum(
    p["times"] * kind["bytes"] for p in programs.values() for kind in p["traffic"].values()
  )
  largest = max(programs, key=lambda name: programs[name]["device_bytes"])
  slowest = max(
    programs, key=lambda name: programs[name]["times"] * programs[name]["time"]["total"]
  )
  several = len(programs) > 1
  mesh = [f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1]
  mfu = plan["utilization"]
  return [
    f"`{config}`",
    plan["topology"],
    ", ".join(mesh) or "-",
    f"{plan['device_bytes'] / 2**30:.2f}" + f" ({largest})" * several,
    f"{plan['chip']['memory'] / 2**30:.2f}",
    f"{total('flops') / 1e12:,.0f}",
    f"{total('bytes_accessed') / 1e9:,.0f}",
    f"{sent / 1e9:,.0f}",
    f"{plan['seconds']:,.1f}",
    f"{slowest}: " * several + programs[slowest]["time"]["bound"],
    "-" if mfu is None else f"{mfu:.0%}",
    f"{sum(p['seconds'] for p in programs.values()):.0f} s",
  ]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("plans"))
  directory = parser.parse_args().directory.resolve()
  directory.mkdir(parents=True, exist_ok=True)
  rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
  rows += [row(config, compile_plan(config, where, directory)) for config, where in PLANS]
  table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
  print(table)
  before, _, rest = PAGE.read_text().partition(BEGIN)
  PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


if __name__ == "__main__":
  main()
