"""Tests worker processes under signals, and when one of them dies."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from vlalign_jax.data.workers import SharedList, StoredList, call, start_pool


def _sleep_or_die(seconds):
  if seconds < 0:
    os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(seconds)


def test_when_one_dies_a_busy_one_is_not_waited_for():
  pool = start_pool(_sleep_or_die, 2)
  for running in [pool.submit(call, 0.1) for _ in range(4)]:
    running.result()
  busy, dead = pool.submit(call, 60), pool.submit(call, -1)
  started = time.monotonic()
  with pytest.raises(BrokenProcessPool):
    dead.result()
  pool.shutdown(cancel_futures=True)
  assert time.monotonic() - started < 20
  assert isinstance(busy.exception(), BrokenProcessPool)


SCRIPT = """
  import signal, sys, time
  from vlalign_jax.data.workers import SharedList, StoredList, call, start_pool

  def slow(number):
    time.sleep(0.2)
    return number

  def main():
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    pool = start_pool(slow, 2)
    assert [pool.submit(call, n).result() for n in (1, 2)] == [1, 2]
    running = [pool.submit(call, n) for n in range(4)]
    print("ready", flush=True)
    while not asked:
      time.sleep(0.01)
    print(sum(future.result() for future in running), pool.submit(call, 7).result(), flush=True)
    pool.shutdown()

  if __name__ == "__main__":
    main()
"""


def test_a_sigterm_to_all_processes_leaves_the_workers_to_the_run(tmp_path):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SCRIPT))
  run = subprocess.Popen(
    [sys.executable, script],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    start_new_session=True,
  )
  assert run.stdout.readline() == "ready\n"
  os.killpg(run.pid, signal.SIGTERM)  # as scancel and timeout do
  assert run.communicate(timeout=20) == ("6 7\n", "")
  assert run.returncode == 0


def test_shared_list_reaches_a_reader_as_a_file():
  items = [{"id": i, "text": "é" * i} for i in range(50)]
  shared = SharedList(items)
  stored = pickle.loads(pickle.dumps(shared))
  assert isinstance(stored, StoredList)
  assert len(stored) == len(shared) == 50
  assert list(stored) == items == list(shared)
  assert stored[-1] == items[-1]
  with pytest.raises(IndexError):
    stored[50]
  assert pickle.loads(pickle.dumps(stored))[7] == items[7]
  empty = SharedList([])
  assert list(pickle.loads(pickle.dumps(empty))) == []
