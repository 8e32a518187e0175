"""Models for prediction: opened, checked, and loaded in the dtype that they compute in."""

import jax
from absl import logging
from ml_collections import ConfigDict

from vlalign_jax import config as configs
from vlalign_jax import trees
from vlalign_jax.config_checks import Config
from vlalign_jax.generation import layout
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import backends, vlm
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.weights import load, source


def open_model(config: Config, key: str, head: str) -> source.ModelSource:
  """Opens a model directory or a run, whose adapters are merged into the weights.

  Args:
    config: of the prediction. A reward model that is a run sees images as it was trained to;
      data.image_aspect applies to all others.
    key: the config key that names the model.
    head: the head that it must have, models.vlm's LANGUAGE or SCORE.

  Raises:
    InputError: it cannot be used, or has the other head.
  """
  where, aspect = configs.value(config, key), config.data.image_aspect
  trained = trained_template(where)
  if key == "model.init_from" and trained not in (None, config.data.template):
    logging.warning(
      "%s was trained with config.data.template=%s, and is prompted with %s",
      *(where, trained, config.data.template),
    )
  if key == "reward_model" and trained:
    aspect = "auto"
  opened = source.open_source(ConfigDict({**configs.shared().model, "init_from": where}), aspect)
  source.check_head(opened, head, f"config.{key}", where)
  load.check_weights(opened)
  return opened


def trained_template(where: str) -> str | None:
  """Returns the template that a run was trained with; None for a Hugging Face directory."""
  run = checkpoints.find_run(where)
  return run_directory.stored_config(run[0])["data"]["template"] if run else None


def sampling_mesh(
  config: Config, model: vlm.ModelConfig, sampling: Sampling, mesh: jax.sharding.Mesh
) -> jax.sharding.Mesh:
  """Returns the mesh that answers are sampled on, see `generation.layout`.

  Args:
    config: of the prediction.
    model: the architecture.
    sampling: how tokens are chosen.
    mesh: as config.mesh says.

  Raises:
    InputError: generation.sampling_mesh does not suit the devices or the heads.
  """
  key, value = "generation.sampling_mesh", config.generation.sampling_mesh
  if wanted := layout.sizes(value, key):
    return layout.make_mesh(mesh, wanted, model, key)
  if value == layout.OWN:
    return mesh
  dtype, blocks = config.model.dtype, mesh.size
  num_rows = -(-config.batch_size // blocks) * blocks
  shapes = vlm.abstract_params(model, param_dtype=dtype)[1]
  shapes = meshes.place(shapes, zero.shardings(mesh, shapes, split=True))
  demand = layout.Demand(model, sampling, num_rows, config.data.max_length, dtype)
  return layout.choose(mesh, shapes, demand, 0.0) or mesh


def load_model(
  opened: source.ModelSource, dtype: str, mesh: jax.sharding.Mesh, attention: str = backends.AUTO
):
  """Returns (graphdef, params split over `fsdp` and `tensor`), all in `dtype`.

  Raises:
    InputError: the model's heads do not divide over the mesh, or a file cannot be read.
  """
  meshes.check_heads(mesh, opened.config.language.heads, opened.config.language.kv_heads)
  graphdef, shapes = vlm.abstract_params(
    opened.config, dtype=dtype, param_dtype=dtype, mesh=mesh, attention=attention
  )
  shapes = meshes.place(shapes, zero.shardings(mesh, shapes, split=True))
  params = load.load_params(opened, shapes)
  kind = mesh.local_devices[0].device_kind
  size = trees.size(params) / 1e6
  logging.info("%.1f M parameters in %s; %d devices (%s)", size, dtype, mesh.size, kind)
  return graphdef, params
