"""Turns running out of memory, on a device or a host, into one error that says what to change.

If the operating system kills the process instead, no error can be shown.
"""

import contextlib
import errno
import functools
import os
import re
import resource
import shlex
import sys
from collections.abc import Callable

import jax

from vlalign_jax.errors import InputError

# Names of programs, with which the error begins.
TRAINING = "the training step"
EVALUATION = "evaluation"
LOADING = "loading weights"
SAMPLING = "sampling answers"
SCORING = "scoring answers"
REFERENCE = "the reference pass"
VALUES = "the critic's values"

_MEMORY = re.compile(
  r"out of memory|ran out of|out_of_memory|bad_alloc|cannot allocate memory|memory space|"
  r"(?:failed|unable|attempting|trying) to (?:allocate|reserve|alloc)|alloc_failed|"
  r"exceeds available hbm|(?:error|failed) allocating",
  re.IGNORECASE,
)
_SIZE = r"([\d.]+)\s*(bytes|[KMGTP]?i?B?\b)"
# How the errors of XLA's compilers and allocators and of numpy state the requested bytes ...
_REQUESTED = (
  re.compile(rf"Used {_SIZE} of", re.IGNORECASE),
  re.compile(rf"HLO temporaries \({_SIZE}\)", re.IGNORECASE),
  re.compile(rf"(?:allocat(?:e|ing)|alloc|reserve)\s+(?:request for\s+)?{_SIZE}", re.IGNORECASE),
)
# ... and the memory of the device.
_CAPACITY = (
  re.compile(rf"Used \S+ of {_SIZE}", re.IGNORECASE),
  re.compile(rf"available HBM \({_SIZE}", re.IGNORECASE),
)
_FREE = re.compile(rf"There are {_SIZE} free", re.IGNORECASE)
_POWERS = {letter: 1024**power for power, letter in enumerate("BKMGTP")}


class OutOfMemory(InputError):
  """A program needs more memory than there is; the message says what to change."""


@contextlib.contextmanager
def explained(program: str, config=None):
  """Turns an out-of-memory error of the block into an OutOfMemory; other errors pass unchanged.

  JAX computes asynchronously, so an error may appear where a result is read: put the reading into
  the block as well. Of nested blocks the innermost names the program.

  Args:
    program: what the block runs, such as TRAINING.
    config: of the run or prediction; None: unknown.

  Raises:
    OutOfMemory: in place of the error of JAX, numpy, Python or the system.
  """
  try:
    yield
  except Exception as error:
    if not is_out_of_memory(error):
      raise
    raise OutOfMemory(message(program, error, config)) from error


def names(program: str) -> Callable:
  """Returns a decorator that puts `explained` around a function.

  The function's first argument is a config or has the attribute `config`.
  """

  def decorate(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(first, *args, **kwargs):
      with explained(program, getattr(first, "config", first)):
        return function(first, *args, **kwargs)

    return call

  return decorate


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether an error means that memory has run out."""
  if isinstance(error, InputError):
    return False
  if isinstance(error, OSError):
    return error.errno == errno.ENOMEM
  if isinstance(error, RuntimeError):  # jax.errors.JaxRuntimeError is one
    return bool(_MEMORY.search(str(error)))
  return isinstance(error, MemoryError)  # numpy's is one, and C++'s bad_alloc becomes one


def message(program: str, error: BaseException, config=None) -> str:
  """Returns one line: the program, the bytes it requested, the memory there is, what to change."""
  size = _first(_REQUESTED, str(error))
  requested = f"it requested {readable(size)}" if size else "the size of its request is unknown"
  return f"out of memory in {program}: {requested}; {_available(error)}; {advice(program, config)}"


def readable(size: float) -> str:
  """Formats a number of bytes, such as "26.6 GiB (28615218128 bytes)"."""
  for unit, letter in (("TiB", "T"), ("GiB", "G"), ("MiB", "M"), ("KiB", "K")):
    if size >= _POWERS[letter]:
      return f"{size / _POWERS[letter]:.1f} {unit} ({size:.0f} bytes)"
  return f"{size:.0f} bytes"


def _first(patterns, text: str) -> float | None:
  """Returns the bytes that the first matching pattern finds in an error's text."""
  for pattern in patterns:
    if match := pattern.search(text):
      with contextlib.suppress(ValueError):
        letter = "B" if match[2].lower() == "bytes" else (match[2].upper() or "B")[0]
        return float(match[1]) * _POWERS[letter]
  return None


def _available(error: BaseException) -> str:
  """Says how much memory the device or the host has, as far as it is known."""
  text = str(error)
  if limit := _first(_CAPACITY, text):
    return f"each device has {readable(limit)}"
  if free := _first((_FREE,), text):
    return f"{readable(free)} of the device were free"
  if not isinstance(error, MemoryError | OSError) and (usage := _fullest_device()):
    limit, used = usage
    return f"a device has {readable(limit)}, of which {readable(used)} are in use"
  return _host_memory()


def _fullest_device() -> tuple[int, int] | None:
  """Returns (limit, bytes in use) of this host's fullest device; None if devices do not report."""
  usages = []
  with contextlib.suppress(RuntimeError):  # a device that has failed reports nothing
    for device in jax.local_devices():
      stats = device.memory_stats() or {}
      if "bytes_limit" in stats:
        usages.append((stats["bytes_limit"], stats.get("bytes_in_use", 0)))
  return max(usages, key=lambda pair: pair[1] / max(pair[0], 1), default=None)


def _host_memory() -> str:
  sizes = {}
  with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
    for line in file:
      name, _, rest = line.partition(":")
      sizes[name] = 1024 * int(rest.split()[0])
  parts = []
  if "MemTotal" in sizes:
    available = readable(sizes.get("MemAvailable", 0))
    parts.append(f"this host has {readable(sizes['MemTotal'])}, of which {available} are free")
  limit, _ = resource.getrlimit(resource.RLIMIT_AS)
  if limit != resource.RLIM_INFINITY:
    parts.append(f"a process may have {readable(limit)} (ulimit -v)")
  with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
    parts.append(f"its container may have {readable(int(file.read()))}")
  return ", ".join(parts) or "the memory of this host is unknown"


def advice(program: str, config=None) -> str:
  """Returns what to change in a config so that a program needs less, the mildest change first."""
  if config is None or "batch_size" not in config:
    return "close other programs, or use a machine with more memory"
  if "optim" not in config:  # only training has an optimizer
    return _advice_for_prediction(program, config)
  ppo, changes = "ppo" in config, []
  mesh = config.mesh
  if program == SAMPLING:
    changes += [
      "lower ppo.slots" if config.ppo.slots else "raise ppo.sample_parts, or set ppo.slots"
    ]
    changes.append("lower ppo.num_generations or ppo.max_new_tokens")
  elif program != LOADING:
    changes.append(f"raise grad_accumulation (now {config.grad_accumulation})")
  if program in (TRAINING, EVALUATION) and config.model.get("remat") != "full":
    changes.append('set model.remat="full"')
  if mesh.zero_stage < 3:
    changes.append(f"raise mesh.zero_stage to 3 (now {mesh.zero_stage})")
  if jax.device_count() > 1:
    changes.append("give mesh.fsdp or mesh.tensor more devices")
  else:
    changes.append("use more devices (mesh.fsdp, mesh.tensor)")
  if program == LOADING:
    changes.append('set model.dtype and model.param_dtype to "bfloat16"')
  else:
    changes.append(f"lower batch_size (now {config.batch_size}) or data.max_length")
  if ppo and program not in (SAMPLING, LOADING):
    changes.append("lower ppo.num_generations or ppo.max_new_tokens")
  return f"{'; '.join(changes)}; to see what needs it: {plan_command(config)}"


def _advice_for_prediction(program: str, config) -> str:
  """Returns `advice` for predict.py, whose programs scripts/plan.py does not compile."""
  changes = []
  if program != LOADING:
    changes.append(f"lower batch_size (now {config.batch_size})")
  if program == SAMPLING:
    changes.append("lower generation.num_return_sequences or generation.max_new_tokens")
    if config.generation.get("sampling_mesh"):
      changes.append('set generation.sampling_mesh=""')
  if config.model.get("dtype") != "bfloat16":
    changes.append('set model.dtype="bfloat16"')
  return "; ".join([*changes, "use more devices (mesh.fsdp, mesh.tensor)"])


def plan_command(config) -> str:
  """Returns the scripts/plan.py command for this process's run, with its config flags."""
  arguments, is_value = [], False
  for argument in sys.argv[1:]:
    name, equals, _ = argument.lstrip("-").partition("=")
    name = name.removeprefix("no") if name.startswith("noconfig.") else name
    is_key = argument.startswith("-") and (name == "config" or name.startswith("config."))
    if is_key or (is_value and not argument.startswith("-")):
      arguments.append(argument)
    is_value = is_key and not equals
  if not arguments:  # called from Python
    arguments = [f"--config=configs/{config.get('stage')}.py:PRESET"]
  return shlex.join(["python", "scripts/plan.py", *arguments, f"--topology={_topology()}"])


def _topology() -> str:
  """Returns the `--topology` of these devices, or YOUR_DEVICES if they have no name there."""
  kind, count = jax.devices()[0].device_kind.lower(), jax.device_count()
  if jax.default_backend() == "cpu":
    return f"cpu:{count}"
  for name in ("h100", "h200", "a100"):
    if name in kind:
      return f"gpu:{name}x{count}"
  return "YOUR_DEVICES"


def script() -> str:
  """Returns the name of the running script."""
  return os.path.basename(sys.argv[0]) or "Python"
