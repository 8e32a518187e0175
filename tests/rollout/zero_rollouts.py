"""One PPO step over several meshes and ZeRO stages: its metrics must be those of one device.

python -m tests.rollout.zero_rollouts DIRECTORY NAME ...   (needs 8 devices; prints JSON)
"""

import json
import sys

import jax

from tests.rollout import tiny
from vlalign_jax.rollout import learn
from vlalign_jax.sharding import hosts

# Name -> overrides of the config.
SETTINGS = {
  "one": {"mesh.data": 1},
  "0,0": {"mesh.data": 8},
  "2,3": {"mesh.fsdp": 8, "ppo.actor_zero_stage": 2, "ppo.critic_zero_stage": 3},
  "3,3": {"mesh.data": 2, "mesh.fsdp": 4, "mesh.zero_stage": 3},
  "3,3 tensor": {"mesh.fsdp": 4, "mesh.tensor": 2, "mesh.zero_stage": 3},
  "3,3 gathered": {"mesh.fsdp": 8, "mesh.zero_stage": 3, "ppo.gather": True},
}


def step(files: tiny.Files, name: str, workdir: str) -> dict:
  """The metrics of the first step."""
  overrides = {"batch_size": 16, "steps": 1, "ppo.num_samples": 2, "ppo.kl_coefficient": 0.2}
  config = files.config(**overrides, **SETTINGS[name])
  devices = jax.devices()[: 1 if name == "one" else 8]
  run = tiny.make_run(files, config, f"{workdir}/{name}", with_other=True, devices=devices)
  train_step = learn.make_train_step(run.held, run.train, run.records, {})
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  _, metrics = train_step(run.state, hosts.to_device(run.held.mesh, rows))
  return {key: float(value) for key, value in metrics.items()}


def main(workdir: str, *names: str) -> None:
  """Prints {name: metrics}."""
  files = tiny.make(f"{workdir}/files")
  print(json.dumps({name: step(files, name, workdir) for name in names}))


if __name__ == "__main__":
  main(*sys.argv[1:])
