"""Kills a run at random moments, checkpoint writes included, and compares it with one left alone.

  python -m benchmarks.kills [--stage=sft] [--kills=20] [--steps=240] [--seed=0]

A tiny model is trained twice by the same command: once without interruption, once with `kill -9` at
moments spread over the whole run, where the same command is given again each time. Metrics
(without those of time) and all that the checkpoints hold must be the same bit for bit; exit code 1
if they are not. Needs requirements-dev.txt. About ten minutes on two CPU cores.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import sft_run, tiny_models
from tests.rollout import tiny_ppo

ROOT = pathlib.Path(__file__).parents[1]
SAVE_EVERY, EVAL_EVERY = 4, 10
STARTING, TRAINING, WRITING = "starting", "training", "writing"
PATIENCE = 300.0  # seconds until a run that does nothing counts as hanging


class Run:
  """The command in a process of its own."""

  def __init__(self, command: list[str], workdir: pathlib.Path, cache: pathlib.Path):
    self.workdir, self.steps = workdir, workdir / "checkpoints"
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe might fill up)
    environment = {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONPATH": str(ROOT),
    }
    self._process = subprocess.Popen(
      [sys.executable, *command, f"--workdir={workdir}"],
      cwd=ROOT,
      env=os.environ | environment,
      stdout=self._log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )

  def logged(self) -> int:
    """The newest step in metrics.jsonl."""
    try:
      with open(self.workdir / "metrics.jsonl", "rb") as file:
        file.seek(max(0, os.path.getsize(file.name) - 4096))
        lines = file.read().split(b"\n")[1:-1]
      return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, ValueError):
      return 0

  def half_written(self) -> list[str]:
    """Checkpoints that have no name of their own yet."""
    return sorted(path.name for path in self.steps.glob("*tmp*"))

  def whole(self) -> list[int]:
    """Steps of the checkpoints that have."""
    return sorted(int(path.name) for path in self.steps.glob("*") if path.name.isdigit())

  def wait_until(self, ready) -> None:
    """Returns when `ready()`; fails if the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
      if self._process.poll() is not None or time.monotonic() > deadline:
        self.kill()
        sys.exit(f"the run ended, or hangs, before it was killed:\n{self.output()}")
      time.sleep(0.0005)

  def kill(self) -> None:
    """kill -9."""
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()

  def finish(self) -> None:
    """Waits for the end; fails if it is not a good one."""
    if code := self._process.wait():
      sys.exit(f"the run ended with code {code}:\n{self.output()}")

  def output(self) -> str:
    """All that it printed."""
    self._log.seek(0)
    return self._log.read()


def make_command(directory: pathlib.Path, stage: str, steps: int) -> list[str]:
  """Writes model and data; returns the command of a run, but for its --workdir."""
  often = {
    "max_steps": steps,
    "save_every": SAVE_EVERY,
    "eval_every": EVAL_EVERY,
    "save_total_limit": 3,
    "save_best_limit": 2,
  }
  if stage == "ppo":
    return _command(tiny_ppo.make(str(directory)).config(**_ppo(directory), **often))
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory / "data"), 40)
  if stage != "sft":
    records = sft_run.ranked(records)
  config = sft_run.make_config(
    directory / "model",
    sft_run.write_json(directory / "data" / "train.json", records[:32]),
    stage,
    **{
      "data.eval": sft_run.write_json(directory / "data" / "eval.json", records[32:]),
      **often,
    },
  )
  return _command(config)


def _ppo(directory: pathlib.Path) -> dict:
  """Settings that make a run carry all that it can from step to step."""
  return {
    "ppo.num_ppo_epochs": 2,
    "ppo.critic_warmup": 3,
    "ppo.score_queue": 30,
    "ppo.kl_target": 0.01,
    "ppo.kl_horizon": 50.0,
    "ppo.stop_kl": 1e-7,
    "ppo.sft_weight": 0.1,
    "ppo.sft_data": f"{directory}/answered.json",
    "ppo.log_samples_every": 3,
  }


def _command(config) -> list[str]:
  return [flag for flag in sft_run.command_line(config, "") if not flag.startswith("--workdir=")]


def plan_kills(kills: int, steps: int, generator: random.Random) -> list[tuple[int, str]]:
  """(step after which, what the run is doing then): steps are spread evenly over the whole run."""
  kinds = [WRITING] * (kills * 2 // 5) + [STARTING] * (kills // 10)
  kinds += [TRAINING] * (kills - len(kinds))
  generator.shuffle(kinds)
  at = sorted(generator.uniform(0, steps - 2 * SAVE_EVERY) for _ in range(kills))
  return [(int(step), kind) for step, kind in zip(at, kinds, strict=True)]


def kill_at(run: Run, step: int, kind: str, generator: random.Random) -> None:
  """Waits for the moment and kills."""
  if kind == STARTING:
    time.sleep(generator.uniform(0.0, 8.0))
  else:
    run.wait_until(lambda: run.logged() >= step)
    if kind == WRITING:
      run.wait_until(run.half_written)
      time.sleep(generator.uniform(0.0, 0.05))
    else:
      time.sleep(generator.uniform(0.0, 0.5))
  run.kill()


def metrics_of(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what time decides."""
  return [
    {key: value for key, value in line.items() if not key.startswith("perf/")}
    for line in sft_run.read_metrics(workdir)
  ]


def content_of(step: pathlib.Path) -> dict[str, bytes]:
  """All that a checkpoint holds, as bytes."""
  with ocp.StandardCheckpointer() as reader:
    arrays = {item: reader.restore(step / item) for item in ("params", "optimizer")}
  flat = {
    jax.tree_util.keystr(path): str(np.asarray(leaf).dtype).encode() + np.asarray(leaf).tobytes()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
  }
  return flat | {"progress": (step / "progress" / "metadata").read_bytes()}


def differences(killed: pathlib.Path, alone: pathlib.Path) -> list[str]:
  """What differs between two finished runs."""
  found = [] if metrics_of(killed) == metrics_of(alone) else ["metrics.jsonl"]
  shown = [run / "rollouts.jsonl" for run in (killed, alone)]
  if shown[1].exists() and shown[0].read_bytes() != shown[1].read_bytes():
    found.append("rollouts.jsonl")
  names = [sorted(os.listdir(run / "checkpoints"), key=int) for run in (killed, alone)]
  if names[0] != names[1]:
    return [*found, f"checkpoints {names[0]} and {names[1]}"]
  compared = 0
  for name in names[0]:
    pair = [content_of(run / "checkpoints" / name) for run in (killed, alone)]
    compared += len(pair[0])
    keys = pair[0].keys() | pair[1].keys()
    found += [f"{name}: {key}" for key in sorted(keys) if pair[0].get(key) != pair[1].get(key)]
  print(f"{len(metrics_of(alone))} lines of metrics, {compared} arrays of checkpoints {names[0]}")
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--stage", choices=("sft", "reward", "dpo", "ppo"), default="sft")
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=240)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # for the comparison
  generator = random.Random(arguments.seed)
  with tempfile.TemporaryDirectory() as temporary:
    directory = pathlib.Path(temporary)
    alone, killed, cache = (directory / name for name in ("alone", "killed", "cache"))
    command = make_command(directory, arguments.stage, arguments.steps)
    start = time.monotonic()
    Run(command, alone, cache).finish()
    print(f"left alone: {arguments.steps} steps in {time.monotonic() - start:.0f} s", flush=True)

    left = 0
    for number, (step, kind) in enumerate(
      plan_kills(arguments.kills, arguments.steps, generator), 1
    ):
      run = Run(command, killed, cache)
      kill_at(run, step, kind, generator)
      half_written = run.half_written()
      left += bool(half_written)
      newest = run.whole()[-1] if run.whole() else "none"
      print(
        f"kill {number:2}: {kind:8} at step {run.logged():3}, newest whole checkpoint {newest}"
        f"{', half-written ' + ', '.join(half_written) if half_written else ''}",
        flush=True,
      )
    Run(command, killed, cache).finish()
    found = differences(killed, alone)
  print(f"{arguments.kills} kills, {left} of them left a half-written checkpoint")
  if found:
    sys.exit(f"NOT the same: {'; '.join(found)}")
  print("the same bit for bit")


if __name__ == "__main__":
  main()
