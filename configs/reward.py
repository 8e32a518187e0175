"""Reward modeling of a vision-language model on ranked answers.

  python scripts/train_reward.py --config=configs/reward.py:llava15_7b --workdir=runs/reward \
    --config.model.init_from=runs/sft \
    --config.data.train=ranked.json --config.data.images=images

Presets, and what to expect of them:
  demo             a tiny model on drawn pictures, see scripts/demo.sh: at least 90 % of held-out
                   pairs are scored in the right order.
  llava15_7b       projector and language model of a 7B model: 110 GB (ZeRO 3) over all devices.
  llava15_7b_lora  adapters on the language model, and the projector: 15 GB.

Both use the recipe of Vision-LLM-Alignment: AdamW (0.9, 0.95), 1e-6, 128 examples an update, cosine
with a warm-up of a tenth, one epoch; adapters take 1e-4, TRL's rate for them.
"""

from ml_collections import ConfigDict

from vlalign_jax.errors import InputError
from vlalign_jax.stages.reward import STAGE

PRESETS = ("demo", "llava15_7b", "llava15_7b_lora")


def get_config(preset: str = "llava15_7b") -> ConfigDict:
  """The config of a preset; every key can be overridden with --config.KEY=VALUE."""
  if preset not in PRESETS:
    raise InputError(f"no reward preset {preset!r}; choose from {', '.join(PRESETS)}")
  c = STAGE.defaults()
  if preset == "demo":
    return _demo(c)
  c.mesh.data, c.mesh.fsdp, c.mesh.zero_stage = 1, -1, 3
  c.optim.learning_rate = 1e-6
  c.optim.warmup_ratio = 0.1
  c.data.image_aspect = "pad"
  c.model.architecture = "llava15_7b"
  if preset == "llava15_7b_lora":
    c.lora.rank = 128
    c.lora.alpha = 256.0
    c.optim.learning_rate = 1e-4
    c.optim.projector_learning_rate = 2e-5
  return c


def _demo(c: ConfigDict) -> ConfigDict:
  c.batch_size = 64
  c.num_train_epochs = 2.0
  c.log_every = 20
  c.save_every = 200
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.train.vision = True
  c.data.max_length = 256
  c.optim.learning_rate = 5e-4
  c.reward.center_rewards_coefficient = 0.01  # PPO compares scores of different questions
  return c
