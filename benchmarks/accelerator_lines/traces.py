"""Reads a trace of jax.profiler with the standard library: which kernels take the time."""

import collections
import glob
import gzip
import json
import os
import re


def longest(directory: str, steps: int, count: int = 40):
  """Yields the kernels that take longest, and the sum of all.

  Args:
    directory: that `jax.profiler.trace` wrote to.
    steps: that were traced; times are of one.
    count: kernels to name.
  """
  path = max(glob.glob(f"{directory}/**/*.trace.json.gz", recursive=True), key=os.path.getmtime)
  with gzip.open(path, "rt", encoding="utf-8") as file:
    events = json.load(file)["traceEvents"]
  processes, threads = {}, {}
  for event in events:
    if event.get("name") == "process_name":
      processes[event["pid"]] = event["args"]["name"]
    if event.get("name") == "thread_name":
      threads[event["pid"], event["tid"]] = event["args"]["name"]
  chosen = _device_threads(processes, threads)
  took, calls, sources = collections.Counter(), collections.Counter(), {}
  for event in events:
    if event.get("ph") != "X" or (event["pid"], event.get("tid")) not in chosen:
      continue
    # Fusions of one kind differ by a number.
    name = re.sub(r"[._]\d+(?=$|_)", "", event["name"])
    took[name] += event.get("dur", 0)
    calls[name] += 1
    arguments = event.get("args", {})
    source = arguments.get("tf_op") or arguments.get("hlo_op") or ""
    sources.setdefault(name, collections.Counter())[source] += event.get("dur", 0)
  lines = sorted({threads.get(key, "") for key in chosen})
  yield {"what": "all kernels", "ms": sum(took.values()) / steps / 1e3, "threads": lines[:8]}
  for name, micros in took.most_common(count):
    yield {
      "what": name[:80],
      "ms": micros / steps / 1e3,
      "calls": calls[name] / steps,
      "mostly": [source[-160:] for source, _ in sources[name].most_common(2)],
    }


def _device_threads(processes: dict, threads: dict) -> set:
  """Returns the (process, thread) pairs whose events are kernels, each counted once."""
  on_device = {pid for pid, name in processes.items() if "/device:" in name}
  for wanted in ("Stream", "XLA Ops"):
    chosen = {key for key, name in threads.items() if key[0] in on_device and wanted in name}
    if chosen:
      return chosen
  # A CPU's kernels run on the pool's threads.
  return {key for key, name in threads.items() if "XLA" in name}
