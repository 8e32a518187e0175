"""Losses and metrics computed by TRL's trainers from arrays, without model, data or optimizer."""

import collections
import types

import torch
from trl import DPOTrainer, RewardTrainer


class Accelerator:
  """The part of accelerate's Accelerator that the trainers use, for one process."""

  device = torch.device("cpu")

  @staticmethod
  def gather(x):
    return x

  gather_for_metrics = gather


def make_trainer(kind, **attributes):
  """Makes a trainer that has only the attributes that its loss reads."""
  trainer = object.__new__(kind)
  trainer.__dict__ |= {
    "model": types.SimpleNamespace(training=True),
    "accelerator": Accelerator(),
    "_metrics": {"train": collections.defaultdict(list)},
    "_total_train_tokens": 0,
    "_tp_size": 1,
    **attributes,
  }
  return trainer


def read(trainer, loss):
  """Returns (loss, metrics) as floats."""
  metrics = {key: values[0] for key, values in trainer._metrics["train"].items()}
  return float(loss), metrics


def dpo(token_logps, mask, reference, *, kinds, weights, beta, label_smoothing):
  """Computes DPOTrainer's loss and metrics of pairs.

  Args:
    token_logps: float[2, N, T], log-probabilities of tokens of the chosen and the rejected answers.
    mask: bool[2, N, T], which tokens belong to an answer.
    reference: float[2, N], summed log-probabilities by the reference model.
    kinds, weights: lists, TRL's loss types and the factor of each.
  """
  masked = torch.tensor(token_logps * mask, dtype=torch.float32).flatten(0, 1)
  mask = torch.tensor(mask).long().flatten(0, 1)
  mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)  # a token of the prompt before
  chosen, rejected = torch.tensor(reference, dtype=torch.float32)
  outputs = types.SimpleNamespace(
    log_probs=masked,
    entropy=torch.zeros_like(masked),
    mean_logits=torch.zeros_like(masked),
    is_top1=torch.zeros_like(masked).bool(),
  )
  trainer = make_trainer(
    DPOTrainer,
    loss_types=kinds,
    loss_weights=weights,
    beta=beta,
    label_smoothing=label_smoothing,
    precompute_ref_logps=True,
    f_divergence_type="reverse_kl",
    ld_alpha=None,
    use_weighting=False,
    aux_loss_enabled=False,
  )
  inputs = {
    "input_ids": torch.zeros_like(mask),
    "attention_mask": torch.ones_like(mask),
    "completion_mask": mask,
    "ref_chosen_logps": chosen,
    "ref_rejected_logps": rejected,
  }
  return read(trainer, trainer._compute_loss(lambda **_: outputs, inputs, False))


def reward(scores, *, margin=None, center_rewards_coefficient=None):
  """Computes RewardTrainer's loss and metrics of pairs with scores float[N, 2], chosen first."""
  logits = torch.tensor(scores, dtype=torch.float32).T.reshape(-1, 1)
  trainer = make_trainer(
    RewardTrainer, args=types.SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient)
  )
  inputs = {"attention_mask": torch.ones(len(logits), 1)}
  if margin is not None:
    inputs["margin"] = torch.tensor(margin, dtype=torch.float32)
  outputs = types.SimpleNamespace(logits=logits)
  return read(trainer, trainer.compute_loss(lambda **_: outputs, inputs))
