"""Direct preference optimization of a vision-language model on ranked answers.

  python scripts/train_dpo.py --config=configs/dpo.py:llava15_7b --workdir=runs/dpo \
    --config.model.init_from=runs/sft \
    --config.data.train=ranked.json --config.data.images=images

Presets, and what to expect of them:
  demo             a tiny model on drawn pictures, see scripts/demo.sh: it prefers the right answer
                   more often than before, and still gives it.
  llava15_7b       projector and language model of a 7B model: 110 GB (ZeRO 3) over all devices. The
                   reference's log-probabilities are computed once before training, so that the
                   reference takes no memory in it.
  llava15_7b_lora  adapters on the language model; the reference is the same model with its adapters
                   off: 15 GB.

llava15_7b is the recipe of Vision-LLM-Alignment: AdamW (0.9, 0.95), 1e-6, 128 examples an update,
cosine with a warm-up of a tenth, beta 0.1, one epoch. With adapters the rate is 5e-6, TRL's for
LoRA in DPO (10 times its full rate).
"""

from ml_collections import ConfigDict

from vlalign_jax.errors import InputError
from vlalign_jax.stages.dpo import STAGE

PRESETS = ("demo", "llava15_7b", "llava15_7b_lora")


def get_config(preset: str = "llava15_7b") -> ConfigDict:
  """The config of a preset; every key can be overridden with --config.KEY=VALUE."""
  if preset not in PRESETS:
    raise InputError(f"no DPO preset {preset!r}; choose from {', '.join(PRESETS)}")
  c = STAGE.defaults()
  if preset == "demo":
    return _demo(c)
  c.mesh.data, c.mesh.fsdp, c.mesh.zero_stage = 1, -1, 3
  c.optim.learning_rate = 1e-6
  c.optim.warmup_ratio = 0.1
  c.data.image_aspect = "pad"
  c.model.architecture = "llava15_7b"
  c.dpo.reference = "cache"
  if preset == "llava15_7b_lora":
    c.lora.rank = 128
    c.lora.alpha = 256.0
    c.train.projector = False
    c.optim.learning_rate = 5e-6
    c.dpo.reference = "step"
  return c


def _demo(c: ConfigDict) -> ConfigDict:
  c.batch_size = 64
  c.num_train_epochs = 0.5
  c.log_every = 20
  c.save_every = 200
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.train.vision = True
  c.data.max_length = 256
  c.optim.learning_rate = 1e-4
  c.dpo.sft_weight = 1.0
  return c
