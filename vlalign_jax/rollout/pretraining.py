"""Conversations whose supervised loss is added to PPO's updates (Ouyang et al. 2022, PPO-ptx)."""

import contextlib
import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from vlalign_jax.data import bad_records
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare as prepare_data
from vlalign_jax.input_pipeline import sft
from vlalign_jax.input_pipeline.prepare import Prepared
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.training import start
from vlalign_jax.weights.source import ModelSource

KEY = "ppo.sft_data"


def prepare(config, source: ModelSource, mesh: Mesh, steps: int) -> Prepared | None:
  """Plans a batch for each update of the actor, as many examples as it has prompts.

  Args:
    config: of the run.
    source: the actor.
    mesh: over which batches are split.
    steps: rollouts of the whole run.

  Returns:
    None without `ppo.sft_weight`.

  Raises:
    InputError: a file or record is bad, or nothing can be learned from them.
  """
  settings, rollouts = config.ppo, steps - config.ppo.critic_warmup
  if not settings.sft_weight:
    return None
  sft_config = config.copy_and_resolve_references()
  sft_config.data.update({"train": settings.sft_data, "samples": "", "repeats": "", "pack": True})
  sft_config.data.update({"eval": "", "eval_samples": "", "eval_fraction": 0.0})
  sft_config.batch_size = config.batch_size // settings.num_mini_batches
  sft_config.max_steps = rollouts * settings.num_ppo_epochs * settings.num_mini_batches
  records, _ = prepare_data.load_records(sft.TASK, sft_config)
  multiple = meshes.row_blocks(mesh) * config.grad_accumulation
  prepared = prepare_data.prepare_train(sft.TASK, sft_config, source, records, multiple)
  # All batches have the rows of the fullest: an update is compiled for each shape.
  plan = prepared.plan
  rows = np.full_like(plan.row_counts, plan.rows)
  images = np.full_like(plan.image_counts, plan.images)
  plan = dataclasses.replace(plan, row_counts=rows, image_counts=images)
  return dataclasses.replace(prepared, plan=plan)


class Stream:
  """The batches of conversations, one for each update; its progress goes through JSON."""

  def __init__(self, config, mesh: Mesh, prepared: Prepared, batches, progress: dict):
    """Goes on where an earlier `progress` stopped; use `opened`.

    Raises:
      InputError: the batches up to there had other examples.
    """
    self._config, self._mesh, self._prepared, self._batches = config, mesh, prepared, batches
    self._count, self._pending = hosts.make_counter(mesh), []
    self._bad = progress.get("bad_records", 0)
    try:
      if progress:
        batches.set_state(progress["data"])
    except InputError as error:
      raise InputError(f"config.{KEY}: {error}") from error

  def take(self) -> dict[str, jax.Array]:
    """Returns the batch of the next update, on the devices."""
    batch = hosts.to_device(self._mesh, next(self._batches))
    self._pending.append(self._count(batch, batch.pop("skipped")))
    return batch

  def progress(self) -> dict:
    """Returns what a resumed run needs to go on from here.

    Raises:
      InputError: too many records could not be read.
    """
    newest, self._pending = jax.device_get(self._pending), []
    self._bad += sum(int(counts["bad_records"]) for counts in newest)
    state = self._batches.get_state()
    examples = max(self._prepared.records, state["step"] * self._prepared.plan.batch_size)
    bad_records.check(KEY, self._bad, examples, self._config.data)
    return {"data": state, "bad_records": self._bad}


@contextlib.contextmanager
def opened(config, mesh: Mesh, prepared: Prepared | None, progress: dict):
  """Opens the Stream of a run that goes on from `progress`; None without conversations."""
  if prepared is None:
    yield None
    return
  with prepared.batches(**start.my_share(mesh)) as batches:
    yield Stream(config, mesh, prepared, batches, progress.get("carried", {}).get("sft", {}))
