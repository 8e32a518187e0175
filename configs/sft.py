"""Supervised fine-tuning of a vision-language model on LLaVA-format conversations.

  python scripts/train_sft.py --config=configs/sft.py:llava15_7b --workdir=runs/sft \
    --config.model.init_from=models/llava-1.5-7b-hf \
    --config.data.train=train.json --config.data.images=images

  python scripts/train_sft.py --config=configs/sft.py:llava15_pretrain --workdir=runs/pretrain \
    --config.model.vision=models/clip-vit-large-patch14-336 \
    --config.model.language=models/vicuna-7b-v1.5 \
    --config.data.train=blip_laion_cc_sbu_558k.json --config.data.images=pretrain_images

Presets, and what to expect of them. Memory is what parameters and optimizer take over all devices
together (16 bytes a trained parameter, 2 a frozen one); it is split evenly over them (ZeRO 3), and
activations come on top: a few GB a device, less with grad_accumulation.
  demo              a tiny model on drawn pictures, see scripts/demo.sh: held-out exact match above
                    90 % after some minutes on two CPU cores.
  llava15_pretrain  LLaVA-1.5's first stage: only the projector, on 558,128 image-caption pairs
                    (LCS-558K): 2,181 steps, 14 GB with a 7B language model, 27 GB with 13B.
  llava15_7b        LLaVA-1.5's second stage: projector and language model, on 665,298 conversations
                    (mix665k): 5,198 steps, 110 GB: 8 devices of 40 GB, or 4 of 80 GB.
  llava15_13b       The same recipe, for a 13B init_from: 210 GB: 8 devices of 80 GB.
  llama3_8b         The same with LLaMA-3's chat format, for an 8B init_from: 130 GB: 8 devices of
                    40 GB, or 4 of 80 GB.
  llama3_70b        The same for a 70B init_from, layers split over groups of 4 devices: 1.1 TB; on
                    a TPU v5p:4x4x8 it takes 20 of 95 GB a device.
  llava_next_7b     LLaVA-NeXT (1.6): vision tower, projector and language model, for a 7B init_from
                    whose pictures have up to five tiles, on about 760,000 conversations: 113 GB.
  internvl3_8b      InternVL3's fine-tuning: projector and language model, for an 8B init_from whose
                    pictures have up to 13 tiles: 123 GB.
  clip_llama2_7b_pretrain, clip_llama3_8b
                    Vision-LLM-Alignment's two stages, from a bare CLIP and a bare LLaMA: first only
                    projector and embeddings (14 GB for 7B, and 2 GB of embeddings), then the
                    language model too.

The LLaVA-1.5 recipe is Table 9 of Liu et al. 2023, "Improved Baselines with Visual Instruction
Tuning": AdamW, cosine, warm-up 0.03, no decay; 1e-3 and batch 256, then 2e-5 and batch 128.
LLaVA-NeXT's is scripts/train/finetune_clip.sh of its repository: the same with 1e-5, and 2e-6 for
the vision tower. InternVL3's is shell/internvl3.0/2nd_finetune/ of its repository: LLaVA-1.5's
second stage with a decay of 0.05, in rows of 16,384 tokens.
Vision-LLM-Alignment reads CLIP's last layer, class token included, through a linear map and
LayerNorm (model.projector=linear), trains the embeddings always, warms up for a tenth of the steps,
and suggests 2e-3 for the first stage. It often turns on model.mmca, too.
"""

from ml_collections import ConfigDict

from vlalign_jax.errors import InputError
from vlalign_jax.stages.sft import STAGE

PRESETS = (
  "demo",
  "llava15_pretrain",
  "llava15_7b",
  "llava15_13b",
  "llama3_8b",
  "llama3_70b",
  "llava_next_7b",
  "internvl3_8b",
  "clip_llama2_7b_pretrain",
  "clip_llama3_8b",
)


def get_config(preset: str = "llava15_7b") -> ConfigDict:
  """The config of a preset; every key can be overridden with --config.KEY=VALUE."""
  if preset not in PRESETS:
    raise InputError(f"no SFT preset {preset!r}; choose from {', '.join(PRESETS)}")
  c = STAGE.defaults()
  if preset == "demo":
    return _demo(c)
  # Whole, a 7B model in training is too large for any one device.
  c.mesh.data, c.mesh.fsdp, c.mesh.zero_stage = 1, -1, 3
  if preset.startswith("clip_"):
    return _original(c, preset)
  # LLaVA-1.5 leaves Adam at PyTorch's beta2.
  c.optim.b2 = 0.999
  c.data.image_aspect = "pad"
  c.model.architecture = "llava15_7b" if preset == "llava15_pretrain" else preset
  if preset == "llava15_pretrain":
    c.batch_size = 256
    c.optim.learning_rate = 1e-3
    c.train.language = False
    c.data.template = "plain"
    c.data.image_aspect = "crop"
  if preset == "llava_next_7b":
    c.train.vision = True
    c.optim.learning_rate, c.optim.vision_learning_rate = 1e-5, 2e-6
    c.data.image_aspect = "auto"
    c.data.max_length = 4096  # of a picture's tokens alone there are up to 2,928
  if preset == "internvl3_8b":
    c.optim.weight_decay = 0.05
    c.data.image_aspect = "auto"
    c.data.template = "auto"
    c.data.max_length = 16384  # of a picture's tokens alone there are up to 3,330
  if preset in ("llama3_8b", "llama3_70b"):
    c.data.template = "llama_3"
  if preset == "llama3_70b":
    # Over 128 devices, ZeRO alone would leave pieces that are too narrow for a TPU to gather well.
    c.mesh.tensor = 4
  return c


def _original(c: ConfigDict, preset: str) -> ConfigDict:
  c.model.projector = "linear"
  c.model.vision_feature_layer = "-1"
  c.model.vision_feature_select_strategy = "full"
  c.train.embeddings = True
  c.optim.warmup_ratio = 0.1
  if preset == "clip_llama3_8b":
    c.model.architecture = "clip_llama3_8b"
    c.data.template = "llama_3"
    return c
  c.model.architecture = "clip_llama2_7b"
  c.data.template = "llama_2"
  c.train.language = False
  c.optim.learning_rate = 2e-3
  return c


def _demo(c: ConfigDict) -> ConfigDict:
  c.batch_size = 32
  c.num_train_epochs = 6.0
  c.log_every = 25
  c.save_every = 200
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.train.vision = True
  c.data.max_length = 256
  c.optim.learning_rate = 2e-3
  return c
