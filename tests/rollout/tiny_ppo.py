"""A tiny PPO run: an actor, another model as its reference, a reward model, and prompts."""

import dataclasses
import json
import os

import numpy as np
import torch
from ml_collections import ConfigDict

from configs import ppo
from tests import parity, sft_run, tiny_models
from tests.data.tokenizers import sentencepiece_style_tokenizer
from tests.prediction.policy_and_reward import make_reward_model
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.rollout import data, pretraining, roles
from vlalign_jax.rollout.reward_text import TextReader
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages.ppo import STAGE
from vlalign_jax.steps import ppo_program
from vlalign_jax.training import start
from vlalign_jax.weights import load, source


@dataclasses.dataclass(frozen=True)
class Files:
  directory: str
  actor: torch.nn.Module
  other: torch.nn.Module  # what a test may take for the reference
  scorer: torch.nn.Module
  kernel: torch.Tensor  # float32[D], the scorer's head

  def config(self, **overrides) -> ConfigDict:
    """Of a run in float32 on all prompts; overrides by dotted keys."""
    config = ppo.get_config("demo")
    settings = {
      "model.init_from": f"{self.directory}/actor",
      "ppo.reward_model": f"{self.directory}/reward",
      "data.train": f"{self.directory}/train.json",
      "data.eval": f"{self.directory}/eval.json",
      "data.max_length": 192,
      "batch_size": 4,
      "max_steps": 2,
      "save_every": 1,
      "save_total_limit": 3,
      "ppo.max_new_tokens": 6,
      "ppo.estimator": "gae",
      "ppo.loss_level": "token",
      "ppo.kl_coef": 0.05,
      "ppo.num_generations": 1,
      "ppo.num_ppo_epochs": 4,
      "ppo.num_mini_batches": 2,
      "ppo.critic_warmup": 0,
      "ppo.cliprange_value": 0.2,
      "optim.learning_rate": 1e-4,
      "optim.warmup_ratio": 0.0,
      "ppo.critic_learning_rate": 3e-4,
      **overrides,
    }
    for key, value in settings.items():
      group, _, name = key.rpartition(".")
      (config[group] if group else config)[name] = value
    return config


def make(directory: str) -> Files:
  actor = tiny_models.make_llava(f"{directory}/actor")
  # Many tokens end an answer, so that some answers do end.
  actor.generation_config.eos_token_id = [*range(7, 500, 5)]
  actor.generation_config.save_pretrained(f"{directory}/actor")
  other = tiny_models.make_llava(f"{directory}/other", seed=9)
  scorer, kernel = make_reward_model(f"{directory}/reward")
  records = sft_run.make_records(directory, 10)
  sft_run.write_json(f"{directory}/train.json", records[:8])
  sft_run.write_json(f"{directory}/eval.json", records[8:])
  sft_run.write_json(f"{directory}/answered.json", records[2:9])
  return Files(directory, actor, other, scorer, kernel)


def make_text_reward(directory: str):
  """(torch model, score weights, tokenizer) of a reward model whose tokens are not the actor's."""
  scorer, kernel = make_reward_model(directory, seed=6, text={"vocab_size": 640})
  tokenizer = sentencepiece_style_tokenizer(legacy=False)
  for name in os.listdir(directory):
    if name.startswith(("tokenizer", "special_tokens")):
      os.remove(os.path.join(directory, name))
  tokenizer.save_pretrained(directory)
  image = tokenizer.convert_tokens_to_ids("<image>")
  path = os.path.join(directory, "config.json")
  with open(path, encoding="utf-8") as file:
    content = json.load(file) | {"image_token_index": image, "image_token_id": image}
  with open(path, "w", encoding="utf-8") as file:
    json.dump(content, file)
  scorer.config.image_token_id = image
  return scorer, kernel, tokenizer


@dataclasses.dataclass(frozen=True)
class Run:
  """All that a script has before its loop."""

  held: object  # collect.Roles
  state: object
  train: object  # Prepared
  records: tuple
  model: object  # the actor's ModelConfig
  sampling: Sampling
  sources: roles.RoleSources
  mixed: object  # Prepared of ppo.sft_data, or None


def make_run(
  files: Files, config: ConfigDict, workdir: str, with_other: bool = False, devices=None
) -> Run:
  """A run that has not begun; with_other: its reference is `files.other`; on all devices."""
  mesh, actor = start.open_run(config, workdir, STAGE, devices)
  sources = roles.open_sources(config, workdir, actor)
  by_function = bool(config.ppo.reward_function)
  records, _ = prepare.load_records(STAGE.task, config, keeps_columns=by_function)
  scorers = roles.find_scorers(config, sources, records.records)
  rows = meshes.row_blocks(mesh) * config.grad_accumulation * config.ppo.num_mini_batches
  train = data.prepare_train(config, actor, records, rows)
  program = ppo_program.make_program(
    config,
    actor.config,
    sources.critic and sources.critic.config,
    sources.reward and sources.reward.config,
    data.make_sampling(config, actor),
    mesh,
    train.plan.steps,
  )
  os.makedirs(f"{workdir}/model")
  state = roles.make_state(config, workdir, sources, program)
  lengths = train.plan.example_lengths
  held = roles.load(config, sources, program, mesh, scorers, state, lengths)
  if with_other:
    opened = source.open_source(parity.model_group(init_from=f"{files.directory}/other"))
    placed = program.actor.params
    params = load.load_params(opened, placed)
    held = dataclasses.replace(held, reference=params)
  sampling = data.make_sampling(config, actor)
  mixed = pretraining.prepare(config, actor, mesh, train.plan.steps)
  return Run(held, state, train, records.records, actor.config, sampling, sources, mixed)


def with_sampling(run: Run, sampling: Sampling):
  """The run's roles, which answer otherwise."""
  generate = make_generate(run.model, sampling, mesh=run.held.sampler.mesh)
  sample = lambda *given: generate(*given[:4])  # noqa: E731
  sampler = dataclasses.replace(run.held.sampler, sample=sample)
  return dataclasses.replace(run.held, sampler=sampler)


def text_reader(run: Run, images: int, answers: int) -> TextReader:
  """What makes rows of text for the run's reward model."""
  return TextReader(run.sources.reward, "vicuna", images, answers)


def examples_of(prepared, step: int = 0) -> list:
  """(Example, its pictures) of all rows of a step, in order."""
  load_example, load_image = prepared.load_example, prepared.load_image
  plan = prepared.plan
  numbers = [number for row in range(plan.rows) for number in plan.rows_of(step, row)]
  examples = [load_example(int(number)) for number in numbers]
  return [(example, [load_image(path)[0] for path in example.images]) for example in examples]


def inputs(model_config, example, pictures, answer) -> dict:
  """What the torch models take of a prompt with an answer."""
  tokens = np.concatenate([example.tokens, answer])
  pixels = parity.pixel_values(model_config, pictures) if pictures else None
  return {"input_ids": torch.tensor(tokens)[None].long(), "pixel_values": pixels}
