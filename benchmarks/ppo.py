"""A whole PPO step of ours against torch loops on the CPU, with the same tiny models and prompts.

  python benchmarks/ppo.py [--rounds=5] [--size=tiny]

A rollout of 8 prompts, each with an image, and answers of 64 tokens drawn at temperature 1; then
one update of actor and critic with AdamW. Actor, reference, critic and reward model all see the
picture; vision towers are frozen; float32, on all cores. Three sides take turns, so that the
machine's mood hits all of them:
  ours            `rollout.learn`, as scripts/train_ppo.py runs it
  batched         transformers' `generate` on one left-padded batch, as in TRL; then four forward
                  passes and the updates, logits of all positions at once
  one at a time   the same with a call of `generate` for each prompt, as in Vision-LLM-Alignment
Ends with exit code 1 if with the tiny model ours is not 1.5 times as fast as batched and three
times as fast as one at a time.
Needs requirements-dev.txt.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types

import generation
import numpy as np

LEARNING_RATE, BETAS, EPSILON, CLIP = 1e-6, (0.9, 0.95), 1e-8, 1.0
KL_COEF, LAMBDA, CLIP_RANGE = 0.1, 0.95, 0.2
# Side -> how many times faster ours is at least.
LEAST = {"batched": 1.5, "one at a time": 3}
MAX_STEPS = 1000


def make_torch_models(directory: str):
  """Returns (actor, reference, critic, reward model); the last two have a head of scores."""
  import torch
  from transformers import LlavaForConditionalGeneration

  def load():
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.eos_token_id = None  # all answers have all tokens
    return model

  class Scorer(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.backbone = load().model
      self.head = torch.nn.Linear(self.backbone.config.text_config.hidden_size, 1, bias=False)

    def forward(self, **batch):
      return self.head(self.backbone(**batch, use_cache=False).last_hidden_state)[..., 0]

  return load(), load(), Scorer(), Scorer()


def torch_side(directory: str, size: str, one_at_a_time: bool):
  """Returns `() -> loss`, which takes a step."""
  import torch

  torch.set_num_threads(os.cpu_count())
  actor, reference, critic, reward = make_torch_models(directory)
  # transformers takes the image's token in an answer for a picture that is missing.
  how = {"top_k": 0, "suppress_tokens": [generation.image_token(size)]}
  answer = generation.torch_side(directory, size, one_at_a_time, actor, how)
  mean, std = (torch.tensor(x)[:, None, None] for x in (generation.MEAN, generation.STD))
  pixels = (torch.tensor(generation.pictures(size)).permute(0, 3, 1, 2) / 255 - mean) / std
  prompts, M = generation.make_prompts(size), generation.NEW_TOKENS
  longest = max(map(len, prompts)) + M
  starts = torch.tensor([len(ids) for ids in prompts])
  places = starts[:, None] + torch.arange(M)  # of the answers' tokens
  optimizers = [
    torch.optim.AdamW(
      [p for p in model.parameters() if p.requires_grad], LEARNING_RATE, BETAS, EPSILON, 0.0
    )
    for model in (actor, critic)
  ]

  def log_probabilities(model, batch):
    logits = model(**batch, use_cache=False).logits[:, :-1]
    found = torch.log_softmax(logits, dim=-1)
    found = found.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return found.gather(1, places - 1)

  def update(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  def step() -> float:
    answers = torch.tensor(answer(True)).long()
    tokens = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, ids in enumerate(prompts):
      tokens[row, : len(ids) + M] = torch.cat([torch.tensor(ids).long(), answers[row]])
    mask = (torch.arange(longest) < starts[:, None] + M).long()
    batch = {"input_ids": tokens, "attention_mask": mask, "pixel_values": pixels}
    with torch.no_grad():
      old, expected = log_probabilities(actor, batch), log_probabilities(reference, batch)
      values = critic(**batch).gather(1, places - 1)
      scores = reward(**batch).gather(1, places[:, -1:])[:, 0]
      rewards = -KL_COEF * (old - expected)
      rewards[:, -1] += scores
      advantages, newest, after = torch.zeros_like(values), 0.0, 0.0
      for t in reversed(range(M)):
        newest = rewards[:, t] + after - values[:, t] + LAMBDA * newest
        advantages[:, t], after = newest, values[:, t]
      returns = advantages + values
      advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = torch.exp(log_probabilities(actor, batch) - old)
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    update(actor, optimizers[0], loss)
    newer = critic(**batch).gather(1, places - 1)
    near = values + (newer - values).clamp(-CLIP_RANGE, CLIP_RANGE)
    worst = torch.maximum((newer - returns) ** 2, (near - returns) ** 2)
    update(critic, optimizers[1], 0.5 * worst.mean())
    return float(loss.detach())

  return step


def make_config():
  """Returns the config of ours."""
  from vlalign_jax.stages.ppo import STAGE

  c = STAGE.defaults()
  c.batch_size, c.max_steps = generation.PROMPTS, MAX_STEPS
  c.model.dtype, c.model.remat = "float32", "none"
  c.train.vision = False
  c.optim.learning_rate, c.optim.schedule = LEARNING_RATE, "constant"
  c.ppo.estimator, c.ppo.kl_coef, c.ppo.lam = "gae", KL_COEF, LAMBDA
  c.ppo.num_generations = c.ppo.num_ppo_epochs = c.ppo.num_mini_batches = 1
  c.ppo.max_new_tokens, c.ppo.temperature, c.ppo.top_k, c.ppo.top_p = generation.NEW_TOKENS, 1, 0, 1
  c.ppo.critic_warmup = 0
  return c


def our_side(directory: str, size: str):
  """Returns `() -> loss`, which takes a step."""
  import functools

  import jax
  from accelerator_lines import models

  from vlalign_jax import trees
  from vlalign_jax.data.plan import ImageSets, plan_batches
  from vlalign_jax.generation.sampling import Sampling
  from vlalign_jax.models import vlm
  from vlalign_jax.optim import optimizer
  from vlalign_jax.rollout import collect, learn
  from vlalign_jax.sharding import hosts
  from vlalign_jax.sharding import mesh as meshes
  from vlalign_jax.steps import ppo_program, sampler
  from vlalign_jax.weights import load

  c = make_config()
  opened, rows = generation.open_ours(directory, size)
  model, length = opened.config, rows["tokens"].shape[1]
  judge, mesh = dataclasses.replace(model, head=vlm.SCORE), meshes.make_mesh(c.mesh)
  sampling = Sampling(generation.NEW_TOKENS, tempered=True)
  program = ppo_program.make_program(c, model, judge, judge, sampling, mesh, MAX_STEPS)
  is_trained = functools.partial(optimizer.is_trained, config=c)
  params = load.load_params(opened, program.actor.params)

  def with_scores(shapes):
    """The actor's weights with a head of scores; towers are shared, as in a run."""
    flat, random = trees.flatten(params), trees.flatten(models.random_params(shapes))
    return trees.unflatten(
      {
        path: leaf
        if path not in flat
        else flat[path]
        if path.startswith("vision/")
        else flat[path].copy()
        for path, leaf in random.items()
      }
    )

  critic, reward = with_scores(program.critic.params), with_scores(program.reward.params)
  critic, critic_frozen = trees.split(critic, is_trained)
  params, frozen = trees.split(params, is_trained)
  roles = collect.Roles(
    program=program,
    sampler=sampler.make_sampler(c, model, program.actor, sampling, mesh, np.array([length]), 0.0),
    frozen=frozen,
    reference=models.copied(params, program.actor.reference),
    critic_frozen=critic_frozen,
    reward=reward,
    reader=None,
    function=None,
    tokenizer=None,
    config=c,
    mesh=mesh,
    shares_features=True,
    same_tower_critic=True,
    same_tower_reward=True,
  )
  count = generation.PROMPTS
  plan = plan_batches(
    np.tile(np.arange(count), MAX_STEPS),
    np.full(count, length, np.int32),
    ImageSets.from_paths([str(n)] for n in range(count)),
    batch_size=count,
    max_length=length,
    row_multiple=1,
    pack=False,
    max_images_per_row=None,
  )
  train_step = learn.make_train_step(roles, types.SimpleNamespace(plan=plan), [None] * count)
  held = {"state": program.init_state(params, critic), "carried": {}}

  def step() -> float:
    held["state"], metrics, held["carried"] = train_step(
      held["state"], hosts.to_device(mesh, rows), held["carried"]
    )
    return float(hosts.of_first(jax.device_get(metrics["loss"])))

  return step


def worker(side: str, directory: str, size: str) -> None:
  """Takes a step for every line on stdin and answers with its seconds and loss."""
  if side == "ours":
    step = our_side(directory, size)
  else:
    step = torch_side(directory, size, side == "one at a time")
  print("ready", flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    loss = step()
    print(json.dumps([time.perf_counter() - start, loss]), flush=True)


def compare(directory: str, size: str, rounds: int) -> list[str]:
  """Prints medians over `rounds` turns, after two of warm-up and compiling; says what fails."""
  sides = {}
  for side in ("ours", *LEAST):
    sides[side] = subprocess.Popen(
      [sys.executable, __file__, f"--worker={side}", f"--directory={directory}", f"--size={size}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert sides[side].stdout.readline() == "ready\n", f"{side} did not start"
  seconds = {side: [] for side in sides}
  for turn in range(-2, rounds):
    for side, process in sides.items():
      process.stdin.write("step\n")
      process.stdin.flush()
      took, loss = json.loads(process.stdout.readline())
      assert np.isfinite(loss), f"{side} has no finite loss"
      if turn >= 0:
        seconds[side].append(took)
    shown = ", ".join(f"{side} {times[-1]:.2f} s" for side, times in seconds.items() if times)
    print(f"turn {turn + 1}/{rounds}: {shown}" if shown else "warm-up", flush=True)
  for process in sides.values():
    process.stdin.close()
    process.wait()
  ratios = {
    side: statistics.median(b / a for a, b in zip(seconds["ours"], seconds[side], strict=True))
    for side in LEAST
  }
  shown = ", ".join(f"{side} {statistics.median(times):.3f} s" for side, times in seconds.items())
  faster = ", ".join(f"{ratio:.1f} x {side}" for side, ratio in ratios.items())
  print(f"{size}: a step of {generation.PROMPTS} answers: {shown}; ours is {faster}", flush=True)
  return [
    f"{ratios[side]:.1f} x {side}, at least {least} are expected"
    for side, least in LEAST.items()
    if size == "tiny" and ratios[side] < least
  ]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--size", choices=tuple(generation.SIZES), default="tiny")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--directory", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  if arguments.worker:
    worker(arguments.worker, arguments.directory, arguments.size)
    return
  with tempfile.TemporaryDirectory() as directory:
    generation.make_model(directory, arguments.size)
    faults = compare(directory, arguments.size, arguments.rounds)
  sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
  main()
