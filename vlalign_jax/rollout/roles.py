"""The models of a PPO run besides the actor: opened, checked, and loaded."""

import dataclasses

import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlalign_jax import config as configs
from vlalign_jax.data.templates import closing
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.rollout import collect
from vlalign_jax.rollout.reward_text import TextReader
from vlalign_jax.steps.ppo import State
from vlalign_jax.steps.ppo_program import Program
from vlalign_jax.training import checkpoints, run_directory, start
from vlalign_jax.weights import pin
from vlalign_jax.weights.load import check_weights, load_params
from vlalign_jax.weights.source import Source, check_head, open_source

REWARD = "reward_weights"


@dataclasses.dataclass(frozen=True)
class Sources:
  """Where the models of a run come from.

  Attributes:
    actor: also the reference, and maybe the critic.
    critic: None: there is none.
    reward: None: a function alone scores.
    reward_template: in which the reward model reads.
  """

  actor: Source
  critic: Source | None
  reward: Source | None
  reward_template: str


def open_sources(config: ConfigDict, workdir: str, actor: Source) -> Sources:
  """Opens what the run needs besides its actor; reads no weights.

  Raises:
    InputError: a model is missing, damaged or of the wrong kind, has changed since the run started,
      or cannot be the critic's start.
  """
  reward, template = None, config.data.template
  if config.ppo.reward_model:
    reward, template = _open_reward(config, template)
    if run_directory.has_saved(epath.Path(workdir)):
      reward = pin.check(reward, workdir, REWARD)
    check_weights(reward)
  critic = None
  if config.ppo.estimator == "gae":
    critic = _critic(config, actor, reward)
    check_weights(critic)
  return Sources(actor, critic, reward, template)


def _open_reward(config: ConfigDict, template: str) -> tuple[Source, str]:
  where, aspect = config.ppo.reward_model, config.data.image_aspect
  if run := checkpoints.find_run(where):
    # It reads, and sees pictures, as it was trained to.
    template, aspect = run_directory.stored_config(run[0])["data"]["template"], "auto"
  opened = open_source(ConfigDict({**configs.shared().model, "init_from": where}), aspect)
  check_head(opened, SCORE, "config.ppo.reward_model", where)
  return opened, template


def _critic(config: ConfigDict, actor: Source, reward: Source | None) -> Source:
  adapters = lora.from_group(config.lora)
  if config.ppo.critic_init == "actor":
    model = dataclasses.replace(actor.config, head=SCORE)
    return dataclasses.replace(actor, config=model, fresh=(*actor.fresh, "score/"))
  if not same_tokens(actor, reward):
    raise InputError(
      f"config.ppo.reward_model={config.ppo.reward_model} has another tokenizer, or sees pictures "
      "otherwise than the actor: the critic reads the actor's tokens and cannot start from it; set "
      'config.ppo.critic_init="actor"'
    )
  return dataclasses.replace(reward, config=dataclasses.replace(reward.config, lora=adapters))


def same_tokens(actor: Source, other: Source) -> bool:
  """Whether a model reads the actor's token ids and pictures as they are."""
  mine, its = (
    (
      source.tokenizer.backend_tokenizer.to_str(),
      source.config.image_token_id,
      source.config.tokens_per_image,
      source.config.vision.image_size,
      source.images.config,
    )
    for source in (actor, other)
  )
  return mine == its


def find_scorers(config: ConfigDict, sources: Sources, records):
  """(TextReader or None, function or None): what scores answers besides a model that reads tokens.

  Args:
    config: of the run.
    sources: its models.
    records: all prompts, held-out ones too.

  Raises:
    InputError: the reward function is not found, or template and tokenizer do not go together.
  """
  function, reward, template = (
    collect.find_function(config),
    sources.reward,
    sources.reward_template,
  )
  if reward is None:
    return None, function
  # Where several tokens end an answer, the reward model has learnt to read at the last of them.
  one_end = not closing(template, reward.tokenizer)
  if one_end and template == config.data.template and same_tokens(sources.actor, reward):
    return None, function
  logging.info("the reward model reads answers as text, in its own tokens (%s)", template)
  images = max((len(set(record.images)) for record in records), default=0)
  reader = TextReader(reward, template, config.data.images, images, config.ppo.num_samples)
  reader.check()
  return reader, function


def make_state(config: ConfigDict, workdir: str, sources: Sources, program: Program) -> State:
  """The state before the first rollout; writes down what the run takes besides its actor."""
  if sources.reward is not None:
    pin.write(sources.reward, workdir, REWARD)
  actor = start.load_trained(config, sources.actor, program.actor)
  critic = None
  if sources.critic is not None:
    critic = start.load_trained(config, sources.critic, program.critic)
    if "score/" in sources.critic.fresh:  # it expects nothing until it has learnt
      critic["score"]["kernel"] = jnp.zeros_like(critic["score"]["kernel"])
  return program.init_state(actor, critic)


def load(config: ConfigDict, sources: Sources, program: Program, mesh: Mesh, scorers):
  """The collect.Roles of a run; `scorers` are those of `find_scorers`."""
  critic = reward = None
  if sources.critic is not None:
    critic = start.load_frozen(config, sources.critic, program.critic)
  if sources.reward is not None:
    reward = load_params(sources.reward, program.reward.params, config.seed)
  return collect.Roles(
    program=program,
    frozen=start.load_frozen(config, sources.actor, program.actor),
    critic_frozen=critic,
    reward=reward,
    reader=scorers[0],
    function=scorers[1],
    tokenizer=sources.actor.tokenizer,
    config=config,
    mesh=mesh,
    shares_features=not (config.train.vision or config.lora.vision_rank),
  )
