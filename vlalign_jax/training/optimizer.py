"""AdamW with learning-rate groups and without decay of norms and biases."""

import optax

from vlalign_jax import trees
from vlalign_jax.training import schedules

GROUPS = ("base", "embeddings", "projector")


def group_of(path: str) -> str:
  """The learning-rate group of a parameter."""
  if path.startswith("language/embedding/"):
    return "embeddings"
  return "projector" if path.startswith("projector/") else "base"


def is_trained(path: str, train) -> bool:
  """Whether the `train` group of a config moves a parameter."""
  if group_of(path) == "embeddings":
    return train.language if train.embeddings is None else train.embeddings
  return train[path.split("/", 1)[0]]


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


def make_optimizer(optim, params, total_steps: int) -> optax.GradientTransformation:
  """The optimizer of a run.

  Args:
    optim: the config's `optim` group.
    params: nested dict of the trained parameters (arrays or shapes).
    total_steps: updates of the whole run.
  """
  rates = learning_rates(optim, total_steps)
  groups = trees.map_paths(lambda path, _: group_of(path), params)
  mask = lambda tree: trees.map_paths(decays, tree)  # noqa: E731
  clip = optax.clip_by_global_norm(optim.grad_clip) if optim.grad_clip else optax.identity()
  # One Adam for all, so that its state is one tree; only the step size differs by group.
  scale = optax.partition(
    {group: optax.scale_by_learning_rate(rate) for group, rate in rates.items()}, groups
  )
  return optax.chain(
    clip,
    optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
    optax.add_decayed_weights(optim.weight_decay, mask=mask),
    scale,
  )
