"""The processes of one run, one per host: how they find each other, and how they end together.

One that ends with an error tells the others through JAX's coordination service, which process 0
runs; they end within seconds instead of waiting for it in a collective. One that is killed is
missed after --heartbeat_timeout; if it was process 0, at once.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import jax
from absl import flags, logging
from jax._src import distributed  # the key-value store, for which there is no public name

from vlalign_jax.errors import InputError

# Where a failed process leaves its message.
_FAILURE = "vlalign_jax/failure"
# Seconds between looks for a message; how long those that have read it wait for the others.
_POLL, _GOODBYE = 2.0, 10.0
_ending = threading.Lock()
# The flags, which are also the arguments of `start`.
FLAGS = ("coordinator", "processes", "process", "start_timeout", "heartbeat_timeout")


def define_flags() -> None:
  """The flags that `start` takes its arguments from; TPU pods and Slurm need none."""
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, a free port that all reach.")
  flags.DEFINE_integer("processes", None, "How many processes the run has, one per host.")
  flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
  flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.", 1)
  flags.DEFINE_integer("heartbeat_timeout", 60, "Seconds after which a silent one is dead.", 2)


def start(
  coordinator: str | None,
  processes: int | None,
  process: int | None,
  start_timeout: int = 300,
  heartbeat_timeout: int = 60,
) -> None:
  """Joins this process to its run; does nothing for a run of one process.

  Call it before anything that asks JAX for devices.

  Args:
    coordinator: "host:port" of process 0; with `processes` and `process`, or none of the three:
      then a Slurm step of several tasks and a TPU pod are recognised.
    processes: how many.
    process: which one this is, from 0.
    start_timeout: seconds to wait for the others.
    heartbeat_timeout: seconds of silence after which a process counts as dead and all end.

  Raises:
    InputError: the flags do not fit together, or the coordinator cannot be reached.
  """
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  if all(value is None for value in given.values()):
    if not (_on_slurm() or _on_tpu_pod()):
      return
    arguments: dict[str, Any] = {"local_device_ids": _slurm_devices()}
    where = "the coordinator that JAX found"
  else:
    host, port = _check(given)
    assert coordinator is not None
    assert process is not None
    if processes == 1:
      return
    if process > 0:
      _wait_for(host, port, start_timeout)
    else:
      _check_free(port, coordinator)
    arguments = {
      "coordinator_address": coordinator,
      "num_processes": processes,
      "process_id": process,
      "cluster_detection_method": "deactivate",
    }
    where = f"--coordinator={coordinator}"
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # SIGTERM is the loop's to handle; JAX's service would catch it from here on.
  jax.config.update("jax_enable_preemption_service", False)
  late = (
    f"{where}: not all processes came within {start_timeout} s; give every host the same command, "
    "with --process=0, 1, ... where it has one, or raise --start_timeout"
  )
  with _ends_after(start_timeout, late):
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=start_timeout + 60,
      heartbeat_timeout_seconds=heartbeat_timeout,
    )
  if distributed.global_state.process_id:
    logging.set_verbosity(logging.WARNING)  # process 0 tells what all do
  threading.Thread(target=_watch, daemon=True).start()


def _check(given: dict[str, Any]) -> tuple[str, int]:
  """(host, port) of the coordinator, if the three flags make sense."""
  missing = [name for name, value in given.items() if value is None]
  if missing:
    raise InputError(
      f"{', '.join(missing)} missing: --coordinator, --processes and --process go together"
    )
  coordinator, processes, process = given.values()
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise InputError(f"--coordinator={coordinator}: give HOST:PORT, such as 10.0.0.1:8476")
  if not 0 <= process < processes:
    raise InputError(
      f"--process={process} is not one of --processes={processes}; they count from 0 to "
      f"{max(0, processes - 1)}"
    )
  return host.strip("[]"), int(port)


def _wait_for(host: str, port: int, timeout: float) -> None:
  """Returns when process 0 listens."""
  deadline, told = time.monotonic() + timeout, False
  while True:
    try:
      socket.create_connection((host, port), timeout=max(1.0, min(10.0, timeout))).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise InputError(
          f"--coordinator={host}:{port} does not answer after {timeout:.0f} s "
          f"({error.strerror or error}); start process 0 there, open the port between the hosts, "
          "or raise --start_timeout"
        ) from error
    if not told:
      logging.info("waiting for process 0 at %s:%d", host, port)
      told = True
    time.sleep(0.5)


def _check_free(port: int, coordinator: str) -> None:
  """JAX may crash where it cannot listen."""
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
  except OSError as error:
    raise InputError(
      f"--coordinator={coordinator}: process 0 cannot listen on port {port} of this machine "
      f"({error.strerror}); choose another port"
    ) from error


@contextlib.contextmanager
def _ends_after(seconds: float, message: str):
  """Ends the process if the block takes longer: JAX would abort it without a word for users."""

  def end():
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _on_slurm() -> bool:
  """Whether this is one of several tasks of a Slurm step."""
  names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
  several = int(os.environ.get("SLURM_NTASKS", "1")) > 1
  return several and all(name in os.environ for name in names)


def _slurm_devices() -> list[int] | None:
  """All GPUs of a node if it has one task; JAX would give a task one GPU."""
  tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
  if not _on_slurm() or tasks != nodes:
    return None
  return list(range(int(os.environ.get("SLURM_GPUS_ON_NODE", "0")))) or None


def _on_tpu_pod() -> bool:
  """Whether this is a TPU VM of several; asks its metadata server, where TPUs are there at all."""
  platforms = getattr(jax.config, "jax_platforms", None) or ""
  if "tpu" not in platforms or "TPU_SKIP_MDS_QUERY" in os.environ:
    return False
  names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
  slices = os.environ.get("MEGASCALE_NUM_SLICES")
  if names is None:
    names = _metadata("worker-network-endpoints")
  if slices is None:
    told = [line.partition(":") for line in _metadata("tpu-env").splitlines()]
    found = {key.strip(): value.strip(" '") for key, _, value in told}
    slices = found.get("MEGASCALE_NUM_SLICES", "1")
  return "," in names or int(slices) > 1


def _metadata(key: str) -> str:
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, TimeoutError):  # a TPU VM of someone else's, alone
    return ""


def _watch() -> None:
  """Ends this process when another one has failed."""
  state = distributed.global_state
  while True:
    time.sleep(_POLL)
    try:
      found = state.client.key_value_try_get(_FAILURE)
    except jax.errors.JaxRuntimeError:  # not there
      continue
    except AttributeError:  # the run has ended in order
      return
    with _ending:
      print(f"error: ended, as {found}", file=sys.stderr, flush=True)
      _leave(state)


def are_several() -> bool:
  """Whether this process has joined others."""
  return jax.distributed.is_initialized()


def fail(shown: str, told: str) -> None:
  """Prints an error, and ends all processes of the run with exit code 1; returns if this is alone.

  An exit in order would wait for processes that wait for this one.

  Args:
    shown: what this process prints.
    told: what the others print.
  """
  with _ending:  # where another has failed before, what fails now is the consequence
    print(shown, file=sys.stderr, flush=True)
    if not are_several():
      return
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was faster
      state.client.key_value_set(_FAILURE, f"process {state.process_id} ended: {told}")
    _leave(state)


def _leave(state) -> None:
  """Exits when all know why: a collective whose other end is gone fails with a trace of its own."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # one of them is dead
    state.client.wait_at_barrier(_FAILURE, round(1000 * _GOODBYE))
  if state.process_id == 0:
    time.sleep(1)  # without the coordinator, JAX aborts the others
  logging.flush()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)
