"""What a run's step takes on devices of some kind, none of which has to be there.

python scripts/plan.py --config=configs/STAGE.py:PRESET --topology=v5e:4x4 [--config.KEY=VALUE ...]

Compiles the very step that training runs for that TPU slice (`pip install -r requirements-tpu.txt`;
no TPU is needed) and prints bytes a device, FLOPs, collectives and an estimate of the time; of PPO
every program of a step, sampling and scoring too. GPUs (gpu:h100x8) go by formula; CPUs are cpu:8.
`--search` looks for the fastest settings that fit.
"""

import json

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli
from vlalign_jax.errors import InputError
from vlalign_jax.planning import planner, ppo, ppo_report, report, search, topology


def main(_):
  topology.stay_on_host()
  c, where = flags.FLAGS.config, flags.FLAGS.topology
  planner.check(c)
  if not where:
    raise InputError(f"--topology is missing; there are {topology.KNOWN}")
  devices = topology.open_topology(where)
  text, numbers = (_plan_ppo if c.stage == planner.PPO else _plan_step)(c, devices)
  print(text)
  if flags.FLAGS.json:
    _write_json(flags.FLAGS.json, numbers)


def _plan_step(c, devices) -> tuple[str, dict]:
  model = planner.model_config(c)
  packed, answers = flags.FLAGS.examples_per_row, flags.FLAGS.answers
  if flags.FLAGS.search:
    plan = search.search(c, model, devices, packed, show=print, answers=answers)
  else:
    plan = planner.plan(c, model, devices, packed, answers)
    if devices.compiles:
      plan = planner.compile_plan(plan)
  return report.text(plan), report.as_json(plan)


def _plan_ppo(c, devices) -> tuple[str, dict]:
  if flags.FLAGS.search:
    raise InputError("--search knows no PPO; leave it out, and give settings as --config.KEY=VALUE")
  plan = ppo.plan(c, devices)
  if devices.compiles:
    plan = ppo.compile_plan(plan, lambda line: print(line, flush=True))
  return ppo_report.text(plan), ppo_report.as_json(plan)


def _write_json(path: str, content: dict) -> None:
  try:
    with open(path, "w", encoding="utf-8") as file:
      json.dump(content, file, indent=2)
      file.write("\n")
  except OSError as error:
    raise InputError(f"--json={path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/sft.py:llava15_7b.")
  flags.DEFINE_string("topology", "", "Such as v5e:4x4, v5p:2x2x4, gpu:h100x8, cpu:8.")
  flags.DEFINE_integer("examples_per_row", 1, "How many examples packing puts into a row.")
  flags.DEFINE_integer("answers", 2, "How many ranked answers an example has (reward, dpo).")
  flags.DEFINE_bool("search", False, "Try ZeRO stages, tensor sizes, remat and micro-batches.")
  flags.DEFINE_string("json", "", "A file for the numbers.")
  cli.run(main)
