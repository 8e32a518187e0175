"""The reference's log-probabilities, computed once before DPO and kept in the run directory.

`RUN_DIR/reference/NAME.npz` holds one number per answer of a data set, under a fingerprint of the
records, of how they become tokens and pixels, and of the model. What is in picture files is not in
it. The reference is freed before training.
"""

import dataclasses
import functools
import hashlib
import io
import math
import zipfile

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import out_of_memory, progress, storage
from vlalign_jax.data import bad_records
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline.prepare import Prepared
from vlalign_jax.models.vlm import ModelConfig, abstract_params
from vlalign_jax.sharding import hosts, zero
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import accumulate, answers
from vlalign_jax.steps.program import reference_model
from vlalign_jax.weights import load, provenance, source

DIRECTORY = "reference"


def log_probabilities(
  config, workdir: str, mesh: Mesh, opened: source.ModelSource, data: dict, share: dict
) -> dict[str, np.ndarray]:
  """Reads or computes the reference's log-probabilities of all answers of data sets.

  Args:
    config: of the run.
    workdir: the run directory.
    mesh: over which batches are split.
    opened: the model that the run starts from.
    data: name of the set -> Prepared.
    share: of `start.my_share`.

  Returns:
    Name -> float32[N, K] by example and rank; 0 where there is no answer, NaN of examples that
    could not be read.

  Raises:
    InputError: a stored file is damaged, or of other data or another model; or too many records
      cannot be read.
  """
  tables = {}
  for name, prepared in data.items():
    place = epath.Path(workdir) / DIRECTORY / f"{name}.npz"
    key = fingerprint(config, opened, prepared)
    tables[name] = _read(place, key) if place.exists() else None
  if all(table is not None for table in tables.values()):
    return tables
  reference = make_reference(config, opened.config, mesh)
  with out_of_memory.explained(out_of_memory.LOADING, config):
    params = load.load_params(opened, reference.params, config.seed)
  for name, prepared in data.items():
    if tables[name] is None:
      tables[name] = _compute(config, reference, params, mesh, prepared, name, share)
      if jax.process_index() == 0:
        key = fingerprint(config, opened, prepared)
        _write(epath.Path(workdir) / DIRECTORY, name, key, tables[name])
  del params
  return tables


def add_to_batch(table: np.ndarray, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Adds `reference` float32[B, S, K] to a host batch, for its `examples`; 0 where there is none.

  Raises:
    InputError: the reference has not seen an example, whose picture could not be read then.
  """
  values = np.where(batch["answers"] >= 0, table[batch["examples"]], 0).astype(np.float32)
  if np.isnan(values).any():
    number = batch["examples"][np.isnan(values).any(axis=-1)][0]
    raise InputError(
      f"example {number} has no log-probability by the reference: its picture could not be read "
      f"when they were computed, and can be now; delete {DIRECTORY}/ in the run directory"
    )
  return batch | {"reference": values}


def fingerprint(config, opened: source.ModelSource, prepared: Prepared) -> str:
  """Returns a hash of what the log-probabilities depend on: records, preprocessing and model."""
  example, pictures = prepared.load_example, prepared.load_image
  digest = hashlib.sha256(repr(sorted(example.data.items())).encode())
  digest.update(opened.tokenizer.backend_tokenizer.to_str().encode())
  model = reference_model(config, opened.config)
  seed = config.seed if opened.fresh else None
  for part in (
    *(provenance.content(opened), model, seed, config.model.dtype, config.model.attention),
    *(pictures.blank, opened.images.config),
  ):
    digest.update(repr(part).encode())
  for number in np.unique(prepared.plan.examples):
    digest.update(repr(example.records[int(number)].content).encode())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Reference:
  """The compiled function that gives the reference's log-probabilities.

  Attributes:
    params: shapes of its parameters, all in model.dtype, with shardings.
    log_probabilities: `(params, batch) -> (int32[B, S] examples, float32[B, S, K])`, on every host.
  """

  params: dict
  log_probabilities: object


def make_reference(config, model: ModelConfig, mesh: Mesh) -> Reference:
  """Returns the reference of a run of an architecture over a mesh."""
  dtype = config.model.dtype
  graphdef, shapes = abstract_params(
    reference_model(config, model),
    dtype=dtype,
    param_dtype=dtype,
    attention=config.model.attention,
    mesh=mesh,
  )
  split = config.mesh.zero_stage >= 3
  params = meshes.place(shapes, zero.shardings(mesh, shapes, split=split))
  chunking = {"mesh": mesh, "chunk": meshes.head_chunk(mesh)}

  def micro_batch(params, batch):
    batch = jax.tree.map(lambda x: meshes.constrain_rows(x, mesh), batch)
    return answers.log_probabilities(nnx.merge(graphdef, params), batch, **chunking)

  def log_probabilities(params, batch):
    # In micro-batches, as training; held-out rows may not divide into as many of them.
    device_rows = batch["tokens"].shape[0] // meshes.row_blocks(mesh)
    parts = accumulate.split_rows(batch, math.gcd(config.grad_accumulation, device_rows))
    per_part = jax.lax.map(functools.partial(micro_batch, params), parts)
    return batch["examples"], accumulate.join_rows(per_part)

  place = meshes.replicated(mesh)  # a few numbers an answer
  return Reference(params, jax.jit(log_probabilities, out_shardings=place))


@out_of_memory.names(out_of_memory.REFERENCE)
def _compute(config, reference, params, mesh, prepared, name: str, share: dict) -> np.ndarray:
  shown = np.unique(prepared.plan.examples)
  table = np.full((int(shown.max()) + 1, prepared.max_answers), np.nan, np.float32)
  missing = np.zeros(len(table), bool)
  missing[shown] = True
  logging.info("%s: the reference's log-probabilities of %d examples", name, len(shown))
  pending, counts, count = [], [], hosts.make_counter(mesh)
  steps = prepared.plan.steps

  def settle(keep: int) -> None:
    while len(pending) > keep:
      numbers, values = jax.device_get(pending.pop(0))
      table[numbers[numbers >= 0]] = values[numbers >= 0]

  with prepared.batches(workers=0, **share) as batches:
    for step in progress.shown(range(steps), "reference", steps, unit="step"):
      batch = next(batches)
      in_step = _examples_of(prepared, step)
      if missing[in_step].any():  # later epochs show them again
        missing[in_step] = False
        batch = hosts.to_device(mesh, batch)
        counts.append(count(batch, batch.pop("skipped")))
        pending.append(reference.log_probabilities(params, batch))
        settle(2)
      if not missing.any():
        break
  settle(0)
  bad = sum(int(one["bad_records"]) for one in jax.device_get(counts))
  bad_records.check(f"data.{name}", bad, prepared.records, config.data)
  return table


def _examples_of(prepared: Prepared, step: int) -> np.ndarray:
  planned = prepared.plan
  first, last = step * planned.rows, (step + 1) * planned.rows
  return planned.examples[planned.offsets[first] : planned.offsets[last]]


def _write(directory: epath.Path, name: str, key: str, table: np.ndarray) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()
  np.savez(content, fingerprint=np.array(key), log_probabilities=table)
  storage.write(str(directory / f"{name}.npz"), content.getvalue())


def _read(place: epath.Path, key: str) -> np.ndarray:
  try:
    with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as content:
      stored, table = str(content["fingerprint"]), content["log_probabilities"]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(f"{place}: damaged ({error}); delete it, and it is computed again") from error
  if stored != key:
    raise InputError(
      f"{place}: the reference's log-probabilities there are of other data, another template or "
      "another model than this command's; delete it to compute them again, or start in a new "
      "--workdir"
    )
  return table
