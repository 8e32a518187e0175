"""Writes trl_ppo.json: advantages and metrics that TRL's PPOTrainer computes from fixed rollouts.

The TRL that the tests install no longer has a PPOTrainer; 0.29.0 was among the last with one.

  pip install --no-deps --target /tmp/trl trl==0.29.0
  PYTHONPATH=/tmp/trl python -m tests.losses.make_trl_ppo

Its `train` runs unchanged, in float64, with arrays in place of models: a model's logits are only
the token's log-probability, and the function that would compute it from logits returns it.
"""

import collections
import contextlib
import json
import pathlib
import types

import numpy as np
import torch
from trl.experimental.ppo import ppo_trainer

FILE = pathlib.Path(__file__).parent / "trl_ppo.json"
N, M, PROMPT, EPOCHS, MINI_BATCHES = 6, 7, 2, 2, 2
TOKEN, END, PAD = 5, 1, 0
ARGUMENTS = {
  "gamma": 0.97,
  "lam": 0.9,
  "kl_coef": 0.3,
  "cliprange": 0.2,
  "cliprange_value": 0.3,
  "missing_eos_penalty": 1.5,
}


def make_rollout() -> dict:
  """Returns random arrays that float32 represents exactly."""
  rng = np.random.default_rng(0)
  lengths = np.array([M, 1, 3, M, M - 1, 2])
  ended = np.array([True, True, True, False, True, True])
  logps = -rng.exponential(1.5, (N, M))
  size = (EPOCHS, N, M)
  arrays = {
    "logps": logps,
    "reference": logps + 0.5 * rng.normal(size=(N, M)),
    "values": rng.normal(size=(N, M)),
    "scores": 3 * rng.normal(size=N),
    "new_logps": logps + 0.25 * rng.normal(size=size),
    "new_values": rng.normal(size=size),
  }
  exact = {key: x.astype(np.float32).tolist() for key, x in arrays.items()}
  return exact | {"lengths": lengths.tolist(), "ended": ended.tolist()}


class Accelerator:
  """The part of accelerate's Accelerator that the trainer uses, for one process."""

  device = torch.device("cpu")

  def print(self, *_):
    pass

  def unwrap_model(self, model):
    return model

  def gather_for_metrics(self, x):
    return x

  def accumulate(self, _):
    return contextlib.nullcontext()

  def backward(self, _):
    pass


def run(rollout: dict, kl_estimator: str) -> dict:
  """Returns what TRL computes and logs."""
  arrays = {key: torch.tensor(x) for key, x in rollout.items()}
  places = torch.arange(M)
  responses = torch.full((N, M), TOKEN)
  responses[places > arrays["lengths"][:, None] - 1] = PAD
  responses[torch.arange(N)[arrays["ended"]], arrays["lengths"][arrays["ended"]] - 1] = END
  queries = torch.arange(2, 2 + N)[:, None].repeat(1, PROMPT) + 10  # identifies the row
  sequences = torch.cat([queries, responses], 1)
  recorded = {"whitened": [], "permutations": []}
  role = types.SimpleNamespace
  policy, reference, value_model, reward_model = role(), role(), role(), role()
  model = role(policy=policy, value_model=value_model, train=lambda: None)
  visits = collections.Counter()

  def shifted(x):
    """Moves [n, M] to the positions before each answer's tokens, [n, PROMPT + M, 1]."""
    full = torch.zeros(len(x), PROMPT + M)
    full[:, PROMPT - 1 : -1] = x
    return full[:, :, None]

  def forward(which, ids, _):
    rows = ids[:, 0] - 12
    if which is reference:
      return role(logits=shifted(arrays["reference"][rows]))
    assert which is model
    epoch = visits["forward"] // MINI_BATCHES
    visits["forward"] += 1
    logits, values = (shifted(arrays[key][epoch][rows]) for key in ("new_logps", "new_values"))
    return role(logits=logits), values

  def get_reward(which, ids, *_):
    rows = ids[:, 0] - 12
    if which is value_model:
      return shifted(arrays["values"][rows]), None, None
    assert which is reward_model
    return None, arrays["scores"][rows].clone(), None

  whiten, permutation = ppo_trainer.masked_whiten, np.random.permutation

  def recorded_whiten(values, mask, **options):
    result = whiten(values, mask, **options)
    recorded["whitened"].append([values.tolist(), (result * mask).tolist()])
    return result

  def recorded_permutation(n):
    result = permutation(n)
    recorded["permutations"].append(result.tolist())
    return result

  ppo_trainer.batch_generation = lambda *_: (sequences, arrays["logps"][:, :, None])
  ppo_trainer.selective_log_softmax = lambda logits, _: logits[..., 0].clone()
  ppo_trainer.forward, ppo_trainer.get_reward = forward, get_reward
  ppo_trainer.masked_whiten = recorded_whiten
  ppo_trainer.unwrap_model_for_generation = lambda *_, **__: contextlib.nullcontext(model)
  np.random.seed(1)
  np.random.permutation = recorded_permutation

  class Trainer(ppo_trainer.PPOTrainer):
    is_deepspeed_enabled = False

    def __init__(self):
      """Does nothing, unlike the real one."""

    def log(self, logs):
      recorded["metrics"] = {
        name: value for name, value in logs.items() if name.split("/")[0] != name
      }

  nothing = role(step=lambda: None, zero_grad=lambda: None, get_last_lr=lambda: [0.0])
  trainer = Trainer()
  trainer.__dict__ |= {
    "args": role(
      **ARGUMENTS,
      kl_estimator=kl_estimator,
      response_length=M,
      temperature=1 - 1e-7,  # it adds as much
      num_ppo_epochs=EPOCHS,
      num_mini_batches=MINI_BATCHES,
      gradient_accumulation_steps=1,
      num_total_batches=1,
      total_episodes=N,
      batch_size=N,
      local_batch_size=N,
      local_mini_batch_size=N // MINI_BATCHES,
      per_device_train_batch_size=N // MINI_BATCHES,
      local_rollout_forward_batch_size=4,
      ds3_gather_for_generation=False,
      logging_steps=None,
      eval_steps=None,
      save_steps=None,
      whiten_rewards=False,
      vf_coef=0.1,
      num_sample_generations=0,
    ),
    "accelerator": Accelerator(),
    "optimizer": nothing,
    "lr_scheduler": nothing,
    "model": model,
    "ref_model": reference,
    "reward_model": reward_model,
    "processing_class": role(pad_token_id=PAD, eos_token_id=END),
    "stop_token_id": END,
    "dataloader": [{"input_ids": queries}],
    "train_dataset_len": N,
    "state": role(),
    "callback_handler": role(
      on_train_begin=lambda *_: role(),
      on_step_end=lambda *_: role(should_save=False),
      on_train_end=lambda *_: role(should_save=False),
    ),
    "control": None,
  }
  try:
    trainer.train()
  finally:
    np.random.permutation, ppo_trainer.masked_whiten = permutation, whiten
  advantages, whitened = recorded.pop("whitened")[0]
  return recorded | {"advantages": advantages, "whitened": whitened}


def main():
  torch.set_default_dtype(torch.float64)
  rollout = make_rollout()
  runs = {kind: run(rollout, kind) for kind in ("k1", "k3")}
  FILE.write_text(json.dumps({"arguments": ARGUMENTS, "rollout": rollout, "runs": runs}) + "\n")


if __name__ == "__main__":
  main()
