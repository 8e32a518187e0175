"""Speed, memory and numerics on one accelerator: a table, and JSON that is written line by line.

  python benchmarks/accelerator.py [--output=accelerator.json] [--only=NAME,..] [--skip=NAME,..]
    [--budget=480] [--profile=DIR] [--tiny]

Every line of the table comes from a process of its own with a time limit: one that crashes, hangs
or runs out of memory loses no other. All have random weights and 7B widths; nothing is downloaded.
Needs jax, flax, optax and ml_collections; lines that compare with torch say so where it is missing.
  --budget   seconds for all; what does not begin in time is named as skipped.
  --only     may also name `variants`, the SFT step by kernel of attention and by remat.
  --profile  writes a trace of two SFT steps there, and lists the kernels that take longest.
  --tiny     sizes for a CPU: shows that the script runs, not how fast anything is.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

# pylint: disable=wrong-import-position
from accelerator_lines import LINES  # noqa: E402

MARK = "@result "


def run_worker(name: str, settings: dict) -> None:
  """Prints each result of a line, marked, as soon as it is there."""
  for result in LINES[name].load()(settings):
    print(MARK + json.dumps(result), flush=True)


def shown(result: dict) -> str:
  """One row of the table."""
  parts = []
  for key, value in result.items():
    if key in ("line", "what"):
      continue
    number = f"{value:.4g}" if isinstance(value, float) else str(value)
    parts.append(f"{key}={number}")
  return f"{result['line']:<14} {result['what']:<44} {'  '.join(parts)}"


def run_line(name: str, settings: dict, environment: dict, limit: float, keep) -> None:
  """Runs one line in a process group of its own and hands its results to `keep`."""
  command = [sys.executable, os.path.abspath(__file__), f"--worker={name}"]
  command.append(f"--settings={json.dumps(settings)}")
  began, count, tail = time.monotonic(), 0, []
  with tempfile.TemporaryFile("w+") as errors:
    process = subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
      env=environment | LINES[name].environment,
      start_new_session=True,
    )
    lines = queue.Queue()

    def read():
      for line in process.stdout:
        lines.put(line)
      lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    problem = None
    while True:
      try:
        line = lines.get(timeout=max(0.1, limit - (time.monotonic() - began)))
      except queue.Empty:
        problem = f"stopped after {limit:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        break
      if line is None:
        break
      if line.startswith(MARK):
        keep({"line": name} | json.loads(line.removeprefix(MARK)))
        count += 1
    code = process.wait()
    with contextlib.suppress(ProcessLookupError):  # what it started
      os.killpg(process.pid, signal.SIGKILL)
    if code and problem is None:
      errors.seek(0)
      tail = [line for line in errors.read().splitlines() if line.strip()][-12:]
      named = [line for line in tail if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)] or tail
      problem = f"exit code {process.returncode}: {named[-1] if named else ''}"[:400]
  result = {"line": name, "what": "done", "seconds": round(time.monotonic() - began, 1)}
  if problem:
    result |= {"what": "failed", "error": problem, "results_before": count}
    print("\n".join(tail), file=sys.stderr)
  keep(result)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--output", default="accelerator.json")
  parser.add_argument("--only", default="")
  parser.add_argument("--skip", default="")
  parser.add_argument("--budget", type=float, default=480)
  parser.add_argument("--profile", default="")
  parser.add_argument("--cache", default="")
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--settings", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    run_worker(arguments.worker, json.loads(arguments.settings))
    return
  only = arguments.only.split(",") if arguments.only else [n for n, x in LINES.items() if x.usual]
  only += ["profile"] * bool(arguments.profile)
  skip = arguments.skip.split(",") if arguments.skip else []
  if unknown := set(only + skip) - set(LINES):
    parser.error(f"unknown lines {sorted(unknown)}; choose from {', '.join(LINES)}")
  if "profile" in only and not arguments.profile:
    parser.error("the line profile needs --profile=DIR")
  results, began = [], time.monotonic()

  def keep(result):
    results.append(result)
    print(shown(result), flush=True)
    with open(arguments.output + ".part", "w", encoding="utf-8") as file:
      json.dump(results, file, indent=1)
    os.replace(arguments.output + ".part", arguments.output)

  with tempfile.TemporaryDirectory() as temporary:
    environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": arguments.cache or temporary,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
      "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
      "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    settings = {"tiny": arguments.tiny, "profile": arguments.profile}
    for name, line in LINES.items():
      if name not in only or name in skip:
        continue
      left = arguments.budget - (time.monotonic() - began)
      if left < 10:
        keep({"line": name, "what": "skipped", "error": "no time left; raise --budget"})
        continue
      limit = line.limit * (10 if arguments.tiny else 1)  # a CPU compiles slowly
      run_line(name, settings, environment, min(left, limit), keep)
  print(f"{time.monotonic() - began:.0f} s; all of it in {arguments.output}")


if __name__ == "__main__":
  main()
