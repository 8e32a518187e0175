"""Times and memory of compiled programs."""

import statistics
import time

import jax

from vlalign_jax.sharding import chips

GIB = 2**30


def seconds(call, *, repeats: int = 5, inner: int = 1) -> float:
  """Returns the median seconds of `call()`, after one warm-up.

  Args:
    call: dispatches work and returns arrays.
    repeats: of what the median is taken.
    inner: calls that are dispatched before the last is waited for.
  """
  jax.block_until_ready(call())
  took = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(inner):
      result = call()
    jax.block_until_ready(result)
    took.append((time.perf_counter() - start) / inner)
  return statistics.median(took)


def compiled(function, *arguments):
  """Returns (the compiled program of a jitted function, seconds that compiling took)."""
  start = time.perf_counter()
  program = function.lower(*arguments).compile()
  return program, time.perf_counter() - start


def temporaries(program) -> float:
  """Returns the GiB that a compiled program allocates beside arguments and results."""
  return program.memory_analysis().temp_size_in_bytes / GIB


def peak_memory() -> float | None:
  """Returns the most GiB that this process held on the device, where the device says so."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in stats else None


def memory_limit() -> float:
  """Returns the bytes that programs may take; 80 GB where the device does not say."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get("bytes_limit", 80e9)


def chip():
  """Returns the `chips.Chip` of the first device, or None where it is not known."""
  kind = jax.devices()[0].device_kind.lower().replace("tpu ", "").replace(" lite", "e")
  known = chips.GPUS | chips.TPUS
  matches = [known[name] for name in sorted(known, key=len) if name in kind]
  return matches[0] if matches else None


def of_peak(flops: float, took: float) -> dict:
  """Returns TFLOP/s and, where the chip's peak is known, the share of it."""
  rate = {"tflops": flops / took / 1e12}
  known = chip()
  return rate | ({"of_peak": flops / took / known.flops} if known and known.flops else {})


def problem(error: BaseException) -> dict:
  """Returns what a result says of a failure."""
  lines = [line for line in str(error).splitlines() if line.strip()] or [""]
  return {"error": f"{type(error).__name__}: {lines[0]}"[:300]}
