"""The prompts of PPO, and how the actor answers them."""

from vlalign_jax.errors import InputError
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.input_pipeline import prepare, prompts
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights.source import ModelSource


def prepare_train(
  config, source: ModelSource, records, row_multiple: int, workdir: str = ""
) -> prepare.Prepared:
  """Plans the prompts of all steps, see `prepare.prepare_train`.

  Raises:
    InputError: no prompt fits, or the run ends before its actor learns.
  """
  prepared = prepare.prepare_train(prompts.TASK, config, source, records, row_multiple, workdir)
  steps, warmup = prepared.plan.steps, config.ppo.critic_warmup
  if warmup >= steps:
    raise InputError(
      f"config.ppo.critic_warmup is {warmup}, and the run has {steps} steps: its actor would never "
      "learn; lower it, or raise num_train_epochs or max_steps"
    )
  return prepared


def make_sampling(config, source: ModelSource) -> Sampling:
  """Returns how the actor answers; it never writes image tokens."""
  return sampling_of(config.ppo, source.config, prompts.stop_tokens(source, config.data.template))


def sampling_of(settings, model: ModelConfig, stop_tokens: tuple[int, ...]) -> Sampling:
  """Returns how an actor answers, from the config's `ppo` group and its architecture."""
  return Sampling(
    max_new_tokens=settings.max_new_tokens,
    num_return_sequences=settings.num_generations,
    stop_tokens=stop_tokens,
    min_new_tokens=settings.min_new_tokens,
    suppress=(model.image_token_id,),
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    cache_dtype=settings.cache_dtype,
    tempered=True,  # log-probabilities at the temperature, as in `steps.ppo`
  )
