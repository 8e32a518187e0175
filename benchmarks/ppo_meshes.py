"""One PPO step over several meshes and ZeRO stages: its metrics must be those of one device.

JAX_PLATFORMS=cpu python -m benchmarks.ppo_meshes [NAME ...]

Rollout, scores and updates are computed on each mesh; prints how far the metrics are from those of
one device (the largest relative difference, and whose), and fails above 1e-4.
"""

import os
import sys
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

from tests.rollout import tiny_ppo
from vlalign_jax.rollout import learn
from vlalign_jax.sharding import hosts

# Name -> overrides of the config.
SETTINGS = {
  "one": {"mesh.data": 1},
  "0,0": {"mesh.data": 8},
  "2,3": {"mesh.fsdp": 8, "ppo.actor_zero_stage": 2, "ppo.critic_zero_stage": 3},
  "3,3": {"mesh.data": 2, "mesh.fsdp": 4, "mesh.zero_stage": 3},
  "3,3 tensor": {"mesh.fsdp": 4, "mesh.tensor": 2, "mesh.zero_stage": 3},
  "3,3 in place": {"mesh.fsdp": 8, "mesh.zero_stage": 3, "ppo.sampling_mesh": ""},
  "3,3 to rows": {"mesh.fsdp": 8, "mesh.zero_stage": 3, "ppo.sampling_mesh": "data=8"},
  "3,3 to heads": {"mesh.fsdp": 8, "mesh.zero_stage": 3, "ppo.sampling_mesh": "tensor=2"},
  "0,0 to heads": {"mesh.data": 8, "ppo.sampling_mesh": "tensor=2"},
}


def step(files: tiny_ppo.Files, name: str, workdir: str) -> dict:
  """The metrics of the first step."""
  overrides = {"batch_size": 16, "max_steps": 1, "ppo.num_generations": 2, "ppo.kl_coef": 0.2}
  config = files.config(**overrides, **SETTINGS[name])
  devices = jax.devices()[: 1 if name == "one" else 8]
  run = tiny_ppo.make_run(files, config, f"{workdir}/{name}", with_other=True, devices=devices)
  train_step = learn.make_train_step(run.held, run.train, run.records)
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  _, metrics, _ = train_step(run.state, hosts.to_device(run.held.mesh, rows), {})
  return {key: float(value) for key, value in metrics.items()}


def main(*names: str) -> int:
  """Compares; gives the exit code."""
  worst = 0.0
  with tempfile.TemporaryDirectory() as workdir:
    files = tiny_ppo.make(f"{workdir}/files")
    one = step(files, "one", workdir)
    for name in names or list(SETTINGS)[1:]:
      found = step(files, name, workdir)
      far = {key: abs(found[key] - one[key]) / (abs(one[key]) + 1e-3) for key in one}
      key = max(far, key=far.get)
      print(f"{name:>14}: {far[key]:.1e} ({key})", flush=True)
      worst = max(worst, far[key])
  return int(worst > 1e-4)


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
