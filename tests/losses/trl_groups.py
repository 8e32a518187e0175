"""TRL's RLOOTrainer and GRPOTrainer on arrays: no generation, models or reward functions."""

import collections
import types

import torch
from trl import GRPOTrainer, RLOOTrainer

from tests.losses.trl_losses import Accelerator

EPSILON = 0.2


class GroupAccelerator(Accelerator):
  process_index = 0
  num_processes = 1

  @staticmethod
  def reduce(x, reduction):
    return x


class Rollout:
  """Stands in for the methods that call models and reward functions."""

  def _tokens(self):
    """Returns the tokens of prompts and of answers."""
    return [[1]] * len(self.lengths), [[2] * int(n) for n in self.lengths]

  def _calculate_rewards(self, *_):
    return self.scores[:, None]

  def _get_per_token_logps_and_entropies(self, model, *_, **__):
    logps = self.reference if model is self.ref_model else self.logps
    return logps, torch.zeros_like(logps), None


class RLOO(Rollout, RLOOTrainer):
  def _generate(self, _):
    prompts, answers = self._tokens()
    return prompts, answers, answers


class GRPO(Rollout, GRPOTrainer):
  def _generate(self, _):
    prompts, answers = self._tokens()
    return prompts, answers, None, answers, None, {}, None, None


def make(kind, mask, arrays: dict, **attributes):
  """Makes a trainer of kind RLOO or GRPO.

  Args:
    mask: bool[N, M].
    arrays: logps and reference float[N, M], scores float[N].
  """
  trainer = object.__new__(kind)
  trainer.__dict__ |= {
    **{key: torch.tensor(x, dtype=torch.float64) for key, x in arrays.items()},
    "lengths": mask.sum(1),
    "model": types.SimpleNamespace(training=True, is_gradient_checkpointing=False),
    "ref_model": types.SimpleNamespace(),
    "accelerator": GroupAccelerator(),
    "args": types.SimpleNamespace(
      per_device_train_batch_size=len(mask),
      gradient_accumulation_steps=1,
      steps_per_generation=1,
      gradient_checkpointing_kwargs=None,
      delta=None,
      use_bias_correction_kl=False,
    ),
    "_tokenizer": types.SimpleNamespace(pad_token_id=0),
    "pad_to_multiple_of": None,
    "mask_truncated_completions": False,
    "beta": 0.0,
    "reward_weights": torch.ones(1),
    "reward_clip_range": None,
    "normalize_advantages": False,
    "multi_objective_aggregation": "sum_then_normalize",
    "reward_func_names": [],
    "num_iterations": 1,
    "use_vllm": False,
    "tools": None,
    "environments": None,
    "environment_factories": None,
    "aux_loss_enabled": False,
    "epsilon_low": EPSILON,
    "epsilon_high": EPSILON,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "importance_sampling_level": "token",
    "current_gradient_accumulation_steps": 1,
    "_entropy_bonus_enabled": False,
    "_pending_extra_logs": {},
    "_pending_metrics": {},
    "_logs": collections.defaultdict(list),
    "_metrics": {"train": collections.defaultdict(list)},
    **attributes,
  }
  return trainer


def advantages(kind, mask, arrays: dict, group: int, **attributes):
  """Returns the trainer's advantages of answers, float64[N], `group` of them to a prompt."""
  trainer = make(kind, mask, arrays, num_generations=group, **attributes)
  inputs = [{"prompt": str(n // group)} for n in range(len(mask))]
  return trainer._generate_and_score_completions(inputs)["advantages"].numpy()


def loss(kind, mask, arrays: dict, old_logps, advantages, **attributes):
  """Returns (loss, gradient with respect to logps float64[N, M], metrics)."""
  trainer = make(kind, mask, arrays, **attributes)
  trainer.logps.requires_grad_()
  mask, old_logps = torch.tensor(mask).long(), torch.tensor(old_logps, dtype=torch.float64)
  inputs = {
    "prompt_ids": mask[:, :1],
    "prompt_mask": mask[:, :1],
    "completion_ids": mask,
    "completion_mask": mask,
    "advantages": torch.tensor(advantages, dtype=torch.float64),
    "old_per_token_logps": old_logps,
    "old_logps": (old_logps * mask).sum(1),
    "ref_per_token_logps": trainer.reference,
  }
  loss_value = trainer._compute_loss(trainer.model, inputs)
  loss_value.backward()
  metrics = {key: values[0] for key, values in trainer._metrics["train"].items()}
  return loss_value.item(), trainer.logps.grad.numpy(), metrics
