"""The models of a planned PPO run: their architectures, and the bytes that a device holds."""

import dataclasses

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import LANGUAGE, SCORE, ModelConfig, abstract_params
from vlalign_jax.optim import optimizer
from vlalign_jax.planning import train_step
from vlalign_jax.planning.step_plan import device_bytes
from vlalign_jax.rollout import data, roles
from vlalign_jax.steps.ppo import GAE
from vlalign_jax.weights import identity, source


@dataclasses.dataclass(frozen=True)
class Models:
  """Architectures, and where weights come from.

  Attributes:
    actor, critic, reward: architectures; the last two may be None.
    sampling: how answers are sampled.
    origins: role -> the result of `identity.identities` for its parameters.
    assumptions: sentences for the reader.
  """

  actor: ModelConfig
  critic: ModelConfig | None
  reward: ModelConfig | None
  sampling: Sampling
  origins: dict[str, dict[str, tuple]]
  assumptions: tuple[str, ...] = ()


def open_models(config) -> Models:
  """Returns the models of the weights that a config names, or else of a published architecture.

  Raises:
    InputError: the config names neither, or models that do not fit together.
  """
  settings = config.ppo
  named = config.model.init_from or config.model.vision or config.model.language
  if settings.reward_model and not named:
    raise InputError(
      "config.ppo.reward_model can be planned only with the actor's own weights: give "
      "config.model.init_from, too, or leave it empty"
    )
  if not named:
    actor = train_step.model_config(config, LANGUAGE)
    sampling = data.sampling_of(settings, actor, stop_tokens=(0,))
    origin = dict.fromkeys(trees.flatten(abstract_params(actor)[1]), ("the base",))
    return _add_scorers(config, actor, sampling, origin)
  opened = source.open_for(config, LANGUAGE)
  files = identity.Files()
  sampling, origin = data.make_sampling(config, opened), identity.identities(opened, files)
  if not settings.reward_model:
    return _add_scorers(config, opened.config, sampling, origin)
  sources = roles.open_sources(config, None, opened)
  others = {"critic": sources.critic, "reward": sources.reward}
  origins = {name: identity.identities(other, files) for name, other in others.items() if other}
  critic, reward = (other and other.config for other in others.values())
  return Models(opened.config, critic, reward, sampling, {"actor": origin} | origins)


def _add_scorers(config, actor: ModelConfig, sampling: Sampling, origin: dict) -> Models:
  """Adds a critic and a reward model of the actor's architecture, trained in the same parts."""
  scorer = dataclasses.replace(actor, head=SCORE)
  origins = {
    path: origin[path]
    if path in origin and not (optimizer.is_trained(path, config) or lora.is_adapter(path))
    else ("the reward model",)
    for path in trees.flatten(abstract_params(scorer)[1])
  }
  needs_reward = not config.ppo.reward_function
  trained = "adapters over the actor's base" if scorer.lora else "trained where the actor is"
  line = f"no reward model is given: it has the actor's architecture, {trained}, and a score head"
  return Models(
    actor,
    scorer if config.ppo.estimator == GAE else None,
    scorer if needs_reward else None,
    sampling,
    {"actor": origin, "critic": origins, "reward": origins},
    (line,) if needs_reward else (),
  )


def resident_bytes(models: Models, program, config) -> dict[str, float]:
  """Returns the bytes that a device holds all the time, as `rollout.roles` loads the models.

  Args:
    models: of the run.
    program: `steps.ppo_program.PPOProgram`.
    config: of the run.

  Returns:
    Name -> bytes. Parameters that several models share count at the first of them.
  """
  pool, state = {}, program.state

  def unshared(role: str, leaves: dict) -> float:
    origins = models.origins[role]
    shared = identity.find(pool, origins, leaves)
    identity.add(pool, origins, leaves)
    return device_bytes([leaf for path, leaf in leaves.items() if path not in shared])

  sizes = {
    "actor, trained": device_bytes(state.params),
    "actor, optimizer": device_bytes(state.actor.optimizer),
    "actor, frozen": unshared("actor", trees.flatten(program.actor.frozen)),
    "reference, unshared": device_bytes(program.actor.reference),
  }
  if program.critic:
    leaves = trees.flatten(program.critic.params)
    stays = {path: x for path, x in leaves.items() if not optimizer.is_trained(path, config)}
    sizes |= {
      "critic, trained": device_bytes(state.critic.params),
      "critic, optimizer": device_bytes(state.critic.optimizer),
      "critic, frozen, unshared": unshared("critic", stays),
    }
  if program.reward:
    sizes["reward model, unshared"] = unshared("reward", trees.flatten(program.reward.params))
  return sizes


def same_towers(models: Models) -> dict[str, bool]:
  """Returns role -> whether it has the actor's vision tower."""
  return {
    role: identity.same_tower(models.actor, models.origins["actor"], other, models.origins[role])
    for role, other in (("critic", models.critic), ("reward", models.reward))
    if other is not None
  }
