"""AdamW with learning-rate groups and without decay of norms and biases."""

import optax

from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.optim import loss_scale, schedules

GROUPS = ("base", "embeddings", "projector")


def group_of(path: str) -> str:
  """The learning-rate group of a parameter."""
  if path.startswith("language/embedding/"):
    return "embeddings"
  return "projector" if path.startswith("projector/") else "base"


def is_trained(path: str, config) -> bool:
  """Whether a run moves a parameter.

  `train.*` says which parts are updated. Where a part has adapters (`lora.*`), they are what is
  updated, and its own weights stay; the score head is always learned.

  Args:
    path: of the parameter.
    config: of the run.
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
  """Matrices decay; norms, biases and single vectors do not."""
  return param.ndim > 1 and not path.endswith(("/bias", "/scale"))


def learning_rates(optim, total_steps: int) -> dict[str, optax.Schedule]:
  """The schedule of each group; a group without a rate of its own has the base rate."""
  peaks = {
    "base": optim.learning_rate,
    "embeddings": optim.embedding_learning_rate,
    "projector": optim.projector_learning_rate,
  }
  return {
    group: schedules.make_schedule(
      optim, optim.learning_rate if peak is None else peak, total_steps
    )
    for group, peak in peaks.items()
  }


def make_optimizer(
  optim, params, total_steps: int, dtype: str = "float32"
) -> optax.GradientTransformation:
  """The optimizer of a run.

  Args:
    optim: the config's `optim` group.
    params: nested dict of the trained parameters (arrays or shapes).
    total_steps: updates of the whole run.
    dtype: in which gradients are computed.
  """
  rates = learning_rates(optim, total_steps)
  groups = trees.map_paths(lambda path, _: group_of(path), params)
  mask = lambda tree: trees.map_paths(decays, tree)  # noqa: E731
  clip = optax.clip_by_global_norm(optim.max_grad_norm) if optim.max_grad_norm else optax.identity()
  # One Adam for all, so that its state is one tree; only the step size differs by group.
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
