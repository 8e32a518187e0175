"""AdamW with learning-rate groups, and without decay of norms and biases."""

import optax

from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.optim import loss_scale, schedules

GROUPS = ("base", "embeddings", "projector", "vision")


def group_of(path: str) -> str:
  """Returns the learning-rate group of a parameter."""
  if path.startswith("language/embedding/"):
    return "embeddings"
  return "projector" if path.startswith("projector/") else "base"


def rate_group(path: str, rates: dict[str, optax.Schedule]) -> str:
  """Returns the key in `learning_rates` of a parameter's schedule."""
  if path.startswith("vision/") and "vision" in rates:
    return "vision"
  return group_of(path)


def is_trained(path: str, config) -> bool:
  """Returns whether a run updates the parameter at `path`.

  The config's `train` group says which parts are trained. In a part with adapters (the `lora`
  group) only these are. The score head is always trained.
  """
  part, train = path.split("/", 1)[0], config.train
  if part == "score" or lora.is_adapter(path):
    return True
  if part == "projector":
    return train.projector
  if part == "vision":
    return train.vision and not config.lora.vision_rank
  if group_of(path) == "embeddings" and train.embeddings is not None:
    return train.embeddings
  return train.language and not config.lora.rank


def decays(path: str, param) -> bool:
  """Returns whether a parameter has weight decay: matrices do; norms, biases and vectors do not."""
  return param.ndim > 1 and not path.endswith(("/bias", "/scale"))


def learning_rates(optim, total_steps: int) -> dict[str, optax.Schedule]:
  """Returns each group's schedule; a group without its own learning rate has the base one.

  The vision tower is a group only if it has its own: optimizers that were saved before there was
  one lack its place.
  """
  peaks = {
    "base": optim.learning_rate,
    "embeddings": optim.embedding_learning_rate,
    "projector": optim.projector_learning_rate,
  }
  if optim.vision_learning_rate is not None:
    peaks["vision"] = optim.vision_learning_rate
  return {
    group: schedules.make_schedule(
      optim, optim.learning_rate if peak is None else peak, total_steps
    )
    for group, peak in peaks.items()
  }


def make_optimizer(
  optim, params, total_steps: int, dtype: str = "float32"
) -> optax.GradientTransformation:
  """Makes the optimizer of a run.

  Args:
    optim: the config's `optim` group.
    params: nested dict of the trained parameters (arrays or shapes).
    total_steps: number of updates.
    dtype: of activations and their gradients; float16 needs loss scaling.
  """
  rates = learning_rates(optim, total_steps)
  groups = trees.map_paths(lambda path, _: rate_group(path, rates), params)
  mask = lambda tree: trees.map_paths(decays, tree)  # noqa: E731
  clip = optax.clip_by_global_norm(optim.max_grad_norm) if optim.max_grad_norm else optax.identity()
  # One Adam for all groups, so that its state is one tree; only the learning rate differs.
  scale = optax.partition(
    {group: optax.scale_by_learning_rate(rate) for group, rate in rates.items()}, groups
  )
  chain = optax.chain(
    clip,
    optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
    optax.add_decayed_weights(optim.weight_decay, mask=mask),
    scale,
  )
  return loss_scale.scale(chain) if dtype == "float16" else chain
