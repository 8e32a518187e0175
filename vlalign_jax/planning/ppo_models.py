"""The models of a PPO run as planned: what they are, and what a device holds of them."""

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
    actor, critic, reward: the last two may be None.
    sampling: of answers.
    origins: role -> what `identity.identities` says of its parameters.
    assumptions: sentences for the reader.
  """

  actor: ModelConfig
  critic: ModelConfig | None
  reward: ModelConfig | None
  sampling: Sampling
  origins: dict[str, dict[str, tuple]]
  assumptions: tuple[str, ...] = ()


def open_models(config) -> Models:
  """Returns the models of a run: of the weights that it names, or else of published size.

  Raises:
    InputError: the config names neither, or models that do not go together.
  """
  settings = config.ppo
  named = config.model.init_from or config.model.vision or config.model.language
  if settings.reward_model and not named:
    raise InputError(
      "config.ppo.reward_model is planned next to the actor's own weights: give "
      "config.model.init_from, too, or leave it empty"
    )
  if not named:
    actor = train_step.model_config(config, LANGUAGE)
    sampling = data.sampling_of(settings, actor, stop_tokens=(0,))
    origin = dict.fromkeys(trees.flatten(abstract_params(actor)[1]), ("the base",))
    return _with_assumed(config, actor, sampling, origin)
  opened = source.open_for(config, LANGUAGE)
  files = identity.Files()
  sampling, origin = data.make_sampling(config, opened), identity.identities(opened, files)
  if not settings.reward_model:
    return _with_assumed(config, opened.config, sampling, origin)
  sources = roles.open_sources(config, None, opened)
  others = {"critic": sources.critic, "reward": sources.reward}
  origins = {name: identity.identities(other, files) for name, other in others.items() if other}
  critic, reward = (other and other.config for other in others.values())
  return Models(opened.config, critic, reward, sampling, {"actor": origin} | origins)


def _with_assumed(config, actor: ModelConfig, sampling: Sampling, origin: dict) -> Models:
  """Adds a reward model and a critic like the actor, trained as the actor is to be."""
  judge = dataclasses.replace(actor, head=SCORE)
  stays = lambda path: not (optimizer.is_trained(path, config) or lora.is_adapter(path))  # noqa: E731
  its = {
    path: origin[path] if stays(path) and path in origin else ("the reward model",)
    for path in trees.flatten(abstract_params(judge)[1])
  }
  scored = not config.ppo.reward_function
  how = "adapters over the actor's base" if judge.lora else "trained where the actor is"
  said = f"no reward model is given: it has the actor's architecture, {how}, and a score head"
  return Models(
    actor,
    judge if config.ppo.estimator == GAE else None,
    judge if scored else None,
    sampling,
    {"actor": origin, "critic": its, "reward": its},
    (said,) if scored else (),
  )


def held(models: Models, program, config) -> dict[str, float]:
  """Returns the bytes that a device holds all the time, as `rollout.roles` brings them there.

  Args:
    models: of the run.
    program: `steps.ppo_program.PPOProgram`.
    config: of the run.

  Returns:
    What it is -> bytes. What several models have the same counts where it is first.
  """
  pool, state, size = {}, program.state, device_bytes

  def more(role: str, leaves: dict) -> float:
    known = models.origins[role]
    shared = identity.find(pool, known, leaves)
    identity.add(pool, known, leaves)
    return size([leaf for path, leaf in leaves.items() if path not in shared])

  sizes = {
    "actor, trained": size(state.params),
    "actor, optimizer": size(state.actor.optimizer),
    "actor, frozen": more("actor", trees.flatten(program.actor.frozen)),
    "reference, unshared": size(program.actor.reference),
  }
  if program.critic:
    leaves = trees.flatten(program.critic.params)
    sizes |= {
      "critic, trained": size(state.critic.params),
      "critic, optimizer": size(state.critic.optimizer),
      "critic, frozen, unshared": more(
        "critic", {p: x for p, x in leaves.items() if not optimizer.is_trained(p, config)}
      ),
    }
  if program.reward:
    sizes["reward model, unshared"] = more("reward", trees.flatten(program.reward.params))
  return sizes


def same_towers(models: Models) -> dict[str, bool]:
  """Returns role -> whether it has the actor's vision tower."""
  return {
    role: identity.same_tower(models.actor, models.origins["actor"], other, models.origins[role])
    for role, other in (("critic", models.critic), ("reward", models.reward))
    if other is not None
  }
