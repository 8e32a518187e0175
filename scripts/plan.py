"""Plans what a training step takes on devices, none of which needs to exist.

python scripts/plan.py --config=configs/STAGE.py:PRESET --topology=v5e:4x4 [--config.KEY=VALUE ...]

Compiles the same step that training runs for TPUs (v5e:4x4), GPUs (gpu:h100x8) or CPUs (cpu:8), and
prints bytes a device, FLOPs, bytes accessed, collectives and an estimate of the time. A step of PPO
has several programs. To install the compilers:

pip install -r requirements-tpu.txt                 # TPUs: libtpu
pip install --no-deps -r requirements-gpu-plan.txt  # GPUs: JAX's CUDA plug-in and cuDNN, 1.7 GB
"""

import json

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli, stages
from vlalign_jax.errors import InputError
from vlalign_jax.planning import report, step_plan, topology, train_step


def main(_):
  topology.stay_on_host()
  c = flags.FLAGS.config
  stage = stages.of_config(c)
  train_step.check(stage, c)
  if not flags.FLAGS.topology:
    raise InputError(f"--topology is missing; there are {topology.KNOWN}")
  devices = topology.open_topology(flags.FLAGS.topology)
  if stage.plan is not None:
    plan = stage.plan(c, devices)
  else:
    model = train_step.model_config(c, stage.head)
    examples, answers = flags.FLAGS.examples_per_row, flags.FLAGS.answers
    plan = train_step.plan(stage, c, model, devices, examples, answers)
  plan = step_plan.compile_plan(plan, lambda line: print(line, flush=True))
  print("\n" + report.as_text(plan))
  if flags.FLAGS.json:
    _write_json(flags.FLAGS.json, report.as_json(plan))


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
  flags.DEFINE_integer("examples_per_row", 1, "Examples that packing puts into a row.")
  flags.DEFINE_integer("answers", 2, "Ranked answers of an example (reward, dpo).")
  flags.DEFINE_string("json", "", "A file to write the numbers to.")
  cli.run(main)
