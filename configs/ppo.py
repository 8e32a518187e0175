"""Proximal policy optimization of a vision-language model: it answers, is scored, and learns.

  python scripts/train_ppo.py --config=configs/ppo.py:llava15_7b --workdir=runs/ppo \
    --config.model.init_from=runs/sft --config.ppo.reward_model=runs/reward \
    --config.data.train=prompts.json --config.data.images=images

A step is a rollout of batch_size prompts and ppo.num_ppo_epochs x ppo.num_mini_batches updates from
it. The last answers of records are absent, or read by reward functions alone. Instead
of a reward model, or in addition to it, a function may score:
--config.ppo.reward_function=module:name.

Presets, and what to expect of them:
  demo             a tiny model on drawn pictures with GRPO's advantages, see scripts/demo.sh: a
                   policy that is right about two held-out questions of three becomes right about
                   four of five or more, with a KL below 1. docs/ppo.md says what that took, and
                   how a critic does.
  llava15_7b       projector and language model of a 7B model, and as much again as its critic.
  llava15_7b_lora  adapters for actor and critic; the reference is the actor with its adapters off.
  rloo             as llava15_7b without a critic: four answers to a prompt are compared.
  grpo             the same with GRPO's advantages, and the penalty of KL in the loss.

The recipe of Vision-LLM-Alignment where it has one: AdamW (0.9, 0.95), actor 1e-6, critic 2e-5 at
ZeRO 2 and 3, top-k 50, top-p 0.95, temperature 0.75, KL 0.1, scores clipped to 10, only the critic
learns in the first 30 steps. Unlike it, advantages are whitened and gamma is 1, as in TRL. With
adapters the actor's rate is 1e-5.
"""

from ml_collections import ConfigDict

from vlalign_jax.errors import InputError
from vlalign_jax.stages.ppo import STAGE

PRESETS = ("demo", "llava15_7b", "llava15_7b_lora", "rloo", "grpo")


def get_config(preset: str = "llava15_7b") -> ConfigDict:
  """The config of a preset; every key can be overridden with --config.KEY=VALUE."""
  if preset not in PRESETS:
    raise InputError(f"no PPO preset {preset!r}; choose from {', '.join(PRESETS)}")
  c = STAGE.defaults()
  if preset == "demo":
    return _demo(c)
  c.mesh.data, c.mesh.fsdp, c.mesh.zero_stage = 1, -1, 3
  c.optim.learning_rate = 1e-6
  c.data.image_aspect = "pad"
  c.model.architecture = "llava15_7b"
  c.save_every = 25
  c.ppo.temperature = 0.75
  c.ppo.top_k = 50
  c.ppo.top_p = 0.95
  if preset in ("rloo", "grpo"):
    c.ppo.estimator = preset
    c.ppo.num_generations = 4
    c.batch_size = 32
    c.ppo.loss_level = "sequence" if preset == "rloo" else "answer"
    c.ppo.kl_coef = 0.05 if preset == "rloo" else 0.04
    return c
  c.ppo.critic_learning_rate = 2e-5
  c.ppo.critic_warmup = 30
  if preset == "llava15_7b":
    c.ppo.actor_zero_stage = 2
  else:
    c.save_every = 5  # its steps are long, its checkpoints small
    c.grad_accumulation = 4  # with this and the next, one device of 80 GB or eight of 16 GB suffice
    c.ppo.sample_parts = 8
    c.lora.rank = 128
    c.lora.alpha = 256.0
    c.train.projector = False
    c.optim.learning_rate = 1e-5
  return c


def _demo(c: ConfigDict) -> ConfigDict:
  c.batch_size = 256
  c.max_steps = 40
  c.save_every = 20
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.train.vision = True
  c.data.max_length = 256
  c.optim.learning_rate = 6e-4
  c.optim.warmup_ratio = 0.05
  c.ppo.estimator = "grpo"
  c.ppo.loss_level = "answer"
  c.ppo.num_generations = 4
  c.ppo.num_ppo_epochs = 2
  c.ppo.num_mini_batches = 4
  c.ppo.max_new_tokens = 8
  return c
