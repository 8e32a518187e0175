"""Opens, checks and loads the models of a PPO run besides the actor."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlalign_jax import config as configs
from vlalign_jax import out_of_memory, trees
from vlalign_jax.config_checks import Config
from vlalign_jax.data.picture_tokens import PictureLayout, tokens_of_record
from vlalign_jax.data.templates import closing
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import picture_sizes
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.optim import optimizer
from vlalign_jax.rollout import collect
from vlalign_jax.rollout.reward_text import TextReader
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.steps import sampler
from vlalign_jax.steps.ppo import PPOState
from vlalign_jax.steps.ppo_program import PPOProgram
from vlalign_jax.training import start
from vlalign_jax.weights import identity, provenance
from vlalign_jax.weights.adapters import AdapterInit
from vlalign_jax.weights.load import check_weights, load_params
from vlalign_jax.weights.source import ModelSource, check_head, open_source

REWARD = "reward_weights"


@dataclasses.dataclass(frozen=True)
class RoleSources:
  """Where the models of a run come from.

  Attributes:
    actor: also the reference, and maybe the critic.
    critic: None: there is no critic.
    reward: None: a function alone scores. Adapters of a run are apart from its weights.
    reward_template: the template in which the reward model reads.
  """

  actor: ModelSource
  critic: ModelSource | None
  reward: ModelSource | None
  reward_template: str


def open_sources(config: Config, workdir: str | None, actor: ModelSource) -> RoleSources:
  """Opens what the run needs besides its actor; reads no weights.

  Args:
    config: of the run.
    workdir: its directory; None: it is only planned.
    actor: what it starts from.

  Raises:
    InputError: a model is missing, damaged or of the wrong kind, has changed since the run started,
      or the critic cannot start from it.
  """
  reward, template = None, config.data.template
  if config.ppo.reward_model:
    reward, template = _open_reward(config, template)
    if workdir is not None and run_directory.has_saved(epath.Path(workdir)):
      reward = provenance.check(reward, workdir, REWARD)
    reward = _with_adapters_apart(reward)
    check_weights(reward)
  critic = None
  if config.ppo.estimator == "gae":
    critic = _critic(config, actor, reward)
    check_weights(critic)
  return RoleSources(actor, critic, reward, template)


def _open_reward(config: Config, template: str) -> tuple[ModelSource, str]:
  where, aspect = config.ppo.reward_model, config.data.image_aspect
  if run := checkpoints.find_run(where):
    # It reads, and sees pictures, as it was trained to.
    template, aspect = run_directory.stored_config(run[0])["data"]["template"], "auto"
  opened = open_source(ConfigDict({**configs.shared().model, "init_from": where}), aspect)
  check_head(opened, SCORE, "config.ppo.reward_model", where)
  return opened, template


def _critic(config: Config, actor: ModelSource, reward: ModelSource | None) -> ModelSource:
  adapters = lora.from_group(config.lora)
  if config.ppo.critic_init == "actor":
    model = dataclasses.replace(actor.config, head=SCORE)
    return dataclasses.replace(actor, config=model, fresh=(*actor.fresh, "score/"))
  assert reward is not None  # the config is checked
  if not same_tokens(actor, reward):
    raise InputError(
      f"config.ppo.reward_model={config.ppo.reward_model} has another tokenizer, or sees pictures "
      "otherwise than the actor: the critic reads the actor's tokens and cannot start from it; set "
      'config.ppo.critic_init="actor"'
    )
  if reward.start:
    # Dropout is of training: the run may have had some.
    trained = reward.config.lora
    if trained and dataclasses.replace(trained, dropout=0.0) == adapters:
      model = dataclasses.replace(reward.config, lora=adapters)
      return dataclasses.replace(reward, config=model)
    reward = dataclasses.replace(reward, runs=(*reward.runs, reward.start.run), start=None)
  return dataclasses.replace(reward, config=dataclasses.replace(reward.config, lora=adapters))


def _with_adapters_apart(reward: ModelSource) -> ModelSource:
  """Returns a run as its base and its adapters: other models may share the base."""
  if not reward.runs:
    return reward
  newest = reward.runs[-1]
  adapters = lora.from_group(run_directory.stored_config(newest[0])["lora"])
  if not adapters:
    return reward
  model = dataclasses.replace(reward.config, lora=adapters)
  return dataclasses.replace(
    reward, config=model, runs=reward.runs[:-1], start=AdapterInit(run=newest)
  )


def same_tokens(actor: ModelSource, other: ModelSource) -> bool:
  """Returns whether a model reads the actor's token ids and pictures as they are."""
  first, second = (
    (
      source.tokenizer.backend_tokenizer.to_str(),
      source.layout,
      source.config.vision.image_size,
      source.images.config,
    )
    for source in (actor, other)
  )
  return first == second


def find_scorers(config: Config, sources: RoleSources, records):
  """Returns (TextReader or None, function or None), which score answers.

  Args:
    config: of the run.
    sources: its models.
    records: all prompts, held-out ones too.

  Raises:
    InputError: the reward function is not found, or template and tokenizer do not fit together.
  """
  function, reward, template = (
    collect.find_function(config),
    sources.reward,
    sources.reward_template,
  )
  if reward is None:
    return None, function
  # Where several tokens end an answer, the reward model has learned to read at the last of them.
  one_end = not closing(template, reward.tokenizer)
  if one_end and template == config.data.template and same_tokens(sources.actor, reward):
    return None, function
  logging.info("the reward model reads answers as text, in its own tokens (%s)", template)
  reader = TextReader(
    reward,
    template,
    _most_tiles(records, reward.layout),
    config.ppo.num_generations,
    config.ppo.blank_images,
  )
  reader.check()
  return reader, function


def _most_tiles(records, layout: PictureLayout) -> int:
  """Returns the most tiles of a record's pictures."""
  if not layout.by_size:
    return max((len(set(record.images)) for record in records), default=0)
  tiles = [0]
  for record in picture_sizes.with_sizes(records, layout):
    try:
      tokens = tokens_of_record(record, layout)
    except InputError:  # the actor's data are checked; a record that is left out has no answers
      continue
    by_path = dict(zip(record.images, tokens, strict=True))
    tiles.append(sum(picture.tiles for picture in by_path.values()))
  return max(tiles)


@out_of_memory.names(out_of_memory.LOADING)
def make_state(config: Config, workdir: str, sources: RoleSources, program: PPOProgram) -> PPOState:
  """Returns the state before the first rollout; records which reward model the run takes."""
  if reward := sources.reward:
    if reward.start:  # recorded as it was opened
      reward = dataclasses.replace(reward, runs=(*reward.runs, reward.start.run), start=None)
    provenance.write(reward, workdir, REWARD)
  actor = start.load_trained(config, sources.actor, program.actor)
  critic = None
  if sources.critic is not None and program.critic is not None:
    critic = start.load_trained(config, sources.critic, program.critic)
    if "score/" in sources.critic.fresh:  # its values are 0 until it has learned
      critic["score"]["kernel"] = jnp.zeros_like(critic["score"]["kernel"])
  return program.init_state(actor, critic)


@out_of_memory.names(out_of_memory.LOADING)
def load(
  config: Config,
  sources: RoleSources,
  program: PPOProgram,
  mesh: Mesh,
  scorers,
  state: PPOState,
  prompt_lengths: np.ndarray,
) -> collect.Roles:
  """Loads the models of a run; weights that several of them share are on the devices once.

  Args:
    config: of the run.
    sources, program: of the run.
    mesh: over which it runs.
    scorers: of `find_scorers`.
    state: which is on the devices, too.
    prompt_lengths: int[P], tokens of all prompts of the run.

  Raises:
    InputError: ppo.sampling_mesh does not suit the devices, the heads or the rows.
  """
  pool, files = {}, identity.Files()
  known = identity.identities(sources.actor, files)
  frozen = start.load_frozen(config, sources.actor, program.actor)
  identity.add(pool, known, trees.flatten(frozen))

  def load(opened: ModelSource, shapes: dict, wanted=lambda path: True):
    origins = identity.identities(opened, files)
    params = _load(pool, origins, config, opened, shapes, wanted)
    return params, identity.same_tower(sources.actor.config, known, opened.config, origins)

  critic, reward, of_critic, of_reward = None, None, False, False
  if sources.critic is not None:
    is_frozen = lambda path: not optimizer.is_trained(path, config)  # noqa: E731
    critic, of_critic = load(sources.critic, program.critic.params, is_frozen)
  if sources.reward is not None:
    reward, of_reward = load(sources.reward, program.reward.params)
  reference = start.load_reference(config, sources.actor, program.actor)
  held = device_bytes([state, frozen, reference, critic, reward])
  actor = sources.actor
  return collect.Roles(
    program=program,
    sampler=sampler.make_sampler(
      config,
      actor.config,
      program.actor,
      program.sampling,
      mesh,
      prompt_lengths,
      held,
      actor.tokenizer.pad_token_id,
    ),
    frozen=frozen,
    reference=reference,
    critic_frozen=critic,
    reward=reward,
    reader=scorers[0],
    function=scorers[1],
    tokenizer=sources.actor.tokenizer,
    config=config,
    mesh=mesh,
    shares_features=not (config.train.vision or config.lora.vision_rank),
    same_tower_critic=of_critic,
    same_tower_reward=of_reward,
  )


def device_bytes(trees_of_arrays) -> int:
  """Returns the bytes that arrays take on a device; those that several trees share count once."""
  arrays = {id(leaf): leaf for leaf in jax.tree.leaves(trees_of_arrays)}
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in arrays.values()
  )


def _load(pool: dict, known: dict, config: Config, opened: ModelSource, shapes: dict, wanted):
  """Loads the wanted parameters that are not in the pool, and adds them to it."""
  leaves = {path: leaf for path, leaf in trees.flatten(shapes).items() if wanted(path)}
  shared = identity.find(pool, known, leaves)
  missing = leaves.keys() - shared.keys()
  params = trees.flatten(load_params(opened, shapes, config.seed, lambda path: path in missing))
  identity.add(pool, known, params)
  sizes = (trees.size(trees.unflatten(x)) / 1e6 for x in (leaves, shared))
  logging.info("%.1f M parameters more, of which %.1f M are shared", *sizes)
  return trees.unflatten({**params, **shared})
