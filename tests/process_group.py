"""Runs of several processes on this machine, each with its part of the CPU devices."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def cpu_devices(count: int) -> dict[str, str]:
  """Returns the environment of a process that has so many CPU devices.

  XLA gives it a thread for each device. Devices that begin with different collectives of a program,
  where the order is free, then wait for each other forever: there are more threads.
  """
  flag = f"--xla_force_host_platform_device_count={count}"
  flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  return {"XLA_FLAGS": flags, "PJRT_NPROC": str(4 * count)}


class Processes:
  """The processes of one run."""

  def __init__(self, command, environment=(), count=2, alone=False, devices=8, **flags):
    """Starts them; `devices` of all together, `flags` of `sharding.processes`."""
    flags = {"coordinator": f"127.0.0.1:{free_port()}", "processes": count} | flags
    shown = [f"--{name}={value}" for name, value in flags.items()] if count > 1 else []
    environment = os.environ | dict(environment) | cpu_devices(devices // count)
    started = 1 if alone else count
    self.outputs = [tempfile.TemporaryFile("w+") for _ in range(started)]  # noqa: SIM115
    self.all = [
      subprocess.Popen(
        [sys.executable, *command, *shown, *([f"--process={index}"] if count > 1 else [])],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
      )
      for index, output in enumerate(self.outputs)
    ]

  def text(self, index: int) -> str:
    """All that one of them printed."""
    self.outputs[index].seek(0)
    return self.outputs[index].read()

  def wait_for(self, ready) -> None:
    """Returns when `ready()`; fails if a process ends before, or after two minutes."""
    deadline = time.monotonic() + 120
    while not ready():
      if any(one.poll() is not None for one in self.all) or time.monotonic() > deadline:
        self.kill()
        pytest.fail("\n".join(self.text(index) for index in range(len(self.all))))
      time.sleep(0.01)

  def end(self, timeout: float = 120) -> list[int]:
    """The exit codes, once all have ended by themselves."""
    try:
      return [one.wait(timeout) for one in self.all]
    finally:
      self.kill()

  def kill(self) -> None:
    """kill -9, all of them."""
    for one in self.all:
      one.kill()
      one.wait()
