"""The processes of one run, one per host: how they start together and end together.

A process that ends with an error notifies the others through JAX's coordination service, which
process 0 runs; they end within seconds instead of waiting for it in a collective. If a process is
killed, the others end after --heartbeat_timeout, or at once if it was process 0.
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
from jax._src import distributed  # the key-value store, which has no public name

from vlalign_jax.errors import InputError

# The key under which a failed process stores its message.
_FAILURE = "vlalign_jax/failure"
# Seconds between checks for a message, and seconds to wait for the other processes to read it.
_POLL, _GOODBYE = 2.0, 10.0
_ending = threading.Lock()
# The flags, named as the arguments of `start`.
FLAGS = ("coordinator", "processes", "process", "start_timeout", "heartbeat_timeout")


def define_flags() -> None:
  """Defines the flags for the arguments of `start`; TPU pods and Slurm need none."""
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; all hosts must reach the port.")
  flags.DEFINE_integer("processes", None, "Number of processes in the run, one per host.")
  flags.DEFINE_integer("process", None, "Index of this process, from 0.")
  flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.", 1)
  flags.DEFINE_integer("heartbeat_timeout", 60, "Seconds of silence after which one is dead.", 2)


def start(
  coordinator: str | None,
  processes: int | None,
  process: int | None,
  start_timeout: int = 300,
  heartbeat_timeout: int = 60,
) -> None:
  """Connects this process to the others of its run; does nothing for a run of one process.

  Call it before JAX initializes its devices.

  Args:
    coordinator: "host:port" of process 0. Without `coordinator`, `processes` and `process`, a Slurm
      step of several tasks and a TPU pod are recognized.
    processes: number of processes.
    process: index of this process, from 0.
    start_timeout: seconds to wait for the others.
    heartbeat_timeout: seconds of silence after which a process counts as dead and all end.

  Raises:
    InputError: the flags do not fit together, or the coordinator cannot be reached.
  """
  values = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  if all(value is None for value in values.values()):
    if not (_on_slurm() or _on_tpu_pod()):
      return
    arguments: dict[str, Any] = {"local_device_ids": _slurm_devices()}
    where = "the coordinator that JAX found"
  else:
    host, port = _check(values)
    assert coordinator is not None
    assert process is not None
    if processes == 1:
      return
    if process > 0:
      _wait_for(host, port, start_timeout)
    else:
      _check_port(port, coordinator)
    arguments = {
      "coordinator_address": coordinator,
      "num_processes": processes,
      "process_id": process,
      "cluster_detection_method": "deactivate",
    }
    where = f"--coordinator={coordinator}"
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # The training loop handles SIGTERM; JAX's service would catch it.
  jax.config.update("jax_enable_preemption_service", False)
  message = (
    f"{where}: not all processes came within {start_timeout} s; give every host the same command, "
    "with --process=0, 1, ... where it has one, or raise --start_timeout"
  )
  with _time_limit(start_timeout, message):
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=start_timeout + 60,
      heartbeat_timeout_seconds=heartbeat_timeout,
    )
  if distributed.global_state.process_id:
    logging.set_verbosity(logging.WARNING)  # process 0 logs for all
  threading.Thread(target=_watch, daemon=True).start()


def _check(values: dict[str, Any]) -> tuple[str, int]:
  """Checks the three flags, and returns (host, port) of the coordinator."""
  missing = [name for name, value in values.items() if value is None]
  if missing:
    raise InputError(
      f"{', '.join(missing)} missing: --coordinator, --processes and --process go together"
    )
  coordinator, processes, process = values.values()
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
  """Waits until process 0 listens."""
  deadline, logged = time.monotonic() + timeout, False
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
    if not logged:
      logging.info("waiting for process 0 at %s:%d", host, port)
      logged = True
    time.sleep(0.5)


def _check_port(port: int, coordinator: str) -> None:
  """Raises InputError if the port is not free; JAX may crash instead."""
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
def _time_limit(seconds: float, message: str):
  """Ends the process with a message if the block takes longer; JAX would abort without one."""

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
  """Returns whether this is one of several tasks of a Slurm step."""
  names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
  several = int(os.environ.get("SLURM_NTASKS", "1")) > 1
  return several and all(name in os.environ for name in names)


def _slurm_devices() -> list[int] | None:
  """Returns all GPUs of a node with one task, to which JAX would assign one GPU; otherwise None."""
  tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
  if not _on_slurm() or tasks != nodes:
    return None
  return list(range(int(os.environ.get("SLURM_GPUS_ON_NODE", "0")))) or None


def _on_tpu_pod() -> bool:
  """Returns whether this is one of several TPU VMs; may ask the metadata server of a TPU VM."""
  platforms = getattr(jax.config, "jax_platforms", None) or ""
  if "tpu" not in platforms or "TPU_SKIP_MDS_QUERY" in os.environ:
    return False
  names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
  slices = os.environ.get("MEGASCALE_NUM_SLICES")
  if names is None:
    names = _metadata("worker-network-endpoints")
  if slices is None:
    lines = [line.partition(":") for line in _metadata("tpu-env").splitlines()]
    variables = {key.strip(): value.strip(" '") for key, _, value in lines}
    slices = variables.get("MEGASCALE_NUM_SLICES", "1")
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
  except (urllib.error.URLError, TimeoutError):  # a single TPU VM outside Google Cloud
    return ""


def _watch() -> None:
  """Ends this process when another process has failed."""
  state = distributed.global_state
  while True:
    time.sleep(_POLL)
    try:
      failure = state.client.key_value_try_get(_FAILURE)
    except jax.errors.JaxRuntimeError:  # there is no message
      continue
    except AttributeError:  # the run has ended normally
      return
    with _ending:
      print(f"error: ended, as {failure}", file=sys.stderr, flush=True)
      _leave(state)


def are_several() -> bool:
  """Returns whether the run has several processes."""
  return jax.distributed.is_initialized()


def fail(message: str, reason: str) -> None:
  """Prints an error, and ends all processes of the run with exit code 1; returns if this is alone.

  A normal exit would wait for processes that wait for this one.

  Args:
    message: printed by this process.
    reason: printed by the others.
  """
  with _ending:  # if another process has failed before, this failure is a consequence: wait
    print(message, file=sys.stderr, flush=True)
    if not are_several():
      return
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster
      state.client.key_value_set(_FAILURE, f"process {state.process_id} ended: {reason}")
    _leave(state)


def _leave(state) -> None:
  """Exits once all processes have read the message, so that none fails in a collective first."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # a process is dead
    state.client.wait_at_barrier(_FAILURE, round(1000 * _GOODBYE))
  if state.process_id == 0:
    time.sleep(1)  # without the coordinator, JAX aborts the others
  logging.flush()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)
