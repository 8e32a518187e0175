"""Supervised fine-tuning of a vision-language model on LLaVA-format conversations.

  python scripts/train_sft.py --config=configs/sft.py:PRESET --workdir=runs/sft \
    --config.model.init_from=models/llava-1.5-7b-hf --config.data.train=train.json

Presets and what to expect of them:
  demo               a tiny model on drawn pictures, see scripts/demo.sh: held-out exact match above
                     90 % after some minutes on two CPU cores.
  llava15_pretrain   LLaVA-1.5's first stage: only the projector, on image-caption pairs
                     (LCS-558K). Needs model.vision and model.language.
  llava15_7b, llava15_13b
                     LLaVA-1.5's second stage: projector and language model, on the 665K mixture.
                     13B differs only by what init_from names.
  llama3_8b          the second stage's recipe with LLaMA-3's chat format.

The LLaVA-1.5 recipe is Table 9 of Liu et al. 2023, "Improved Baselines with Visual Instruction
Tuning": AdamW, cosine, warm-up 0.03, no decay; 1e-3 and batch 256, then 2e-5 and batch 128.
"""

from ml_collections import ConfigDict

from vlalign_jax.config import defaults
from vlalign_jax.errors import InputError

PRESETS = ("demo", "llava15_pretrain", "llava15_7b", "llava15_13b", "llama3_8b")


def get_config(preset: str = "llava15_7b") -> ConfigDict:
  """The config of a preset; every key can be overridden with --config.KEY=VALUE."""
  if preset not in PRESETS:
    raise InputError(f"no SFT preset {preset!r}; choose from {', '.join(PRESETS)}")
  c = defaults("sft")
  if preset == "demo":
    return _demo(c)
  # LLaVA-1.5 leaves Adam at PyTorch's beta2.
  c.optim.b2 = 0.999
  c.data.image_aspect = "pad"
  if preset == "llava15_pretrain":
    c.batch_size = 256
    c.optim.learning_rate = 1e-3
    c.train.language = False
    c.data.template = "plain"
    c.data.image_aspect = "crop"
  if preset == "llama3_8b":
    c.data.template = "llama_3"
  return c


def _demo(c: ConfigDict) -> ConfigDict:
  c.batch_size = 64
  c.epochs = 7.0
  c.log_every = 20
  c.save_every = 200
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.train.vision = True
  c.data.max_length = 256
  c.optim.learning_rate = 2e-3
  return c
