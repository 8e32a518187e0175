"""Opens the adapters that a run starts from: a PEFT directory or a LoRA run."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vlalign_jax import storage, trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora, vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.weights import hf_config, names, peft, provenance
from vlalign_jax.weights.tensors import Tensor, read_headers

if TYPE_CHECKING:
  from vlalign_jax.weights.parts import ModelSource


@dataclasses.dataclass(frozen=True)
class AdapterInit:
  """Names adapters, and the parameters that were fully trained with them; one field is empty.

  Attributes:
    tensors: canonical name -> tensor of a PEFT directory.
    run: (run directory, checkpoint step); all that the run trained is taken from there.
  """

  tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
  run: tuple[str, int] | None = None


def open_start(config, model: vlm.ModelConfig, base: "ModelSource") -> AdapterInit | None:
  """Opens the adapters that `lora.init_from` names; reads configs and headers only.

  Args:
    config: of the run that the adapters are for.
    model: with the run's adapters.
    base: the weights that the adapters are added to.

  Returns:
    None if `lora.init_from` is empty.

  Raises:
    InputError: it is missing or damaged; its adapters have other places, another rank or another
      scale than the run's, or belong to other weights; or it has parameters that the run does not
      train.
  """
  where = config.lora.init_from
  if not where:
    return None
  storage.check(where, "lora.init_from")
  shapes = trees.flatten(vlm.abstract_params(model)[1])
  ranks = {path: model.lora.rank_of(path) for path in lora.linear_maps(shapes)}
  expected = {path: (rank, model.lora.scale(rank)) for path, rank in ranks.items() if rank}
  if run := checkpoints.find_run(where):
    start, stored, fully_trained = _open_run(*run)
    _check_base(start.run[0], base, config.model.init_from)
  else:
    start, stored, fully_trained = _open_peft(where, model)
  _compare(stored, expected, where)
  if unknown := sorted(path for path in fully_trained if path not in shapes):
    raise InputError(
      f"lora.init_from={where}: {', '.join(unknown)} were trained with its adapters, and this "
      "model does not have them; export that model merged, and name it as model.init_from"
    )
  if frozen := sorted(path for path in fully_trained if not optimizer.is_trained(path, config)):
    raise InputError(
      f"lora.init_from={where}: {', '.join(frozen)} were trained with its adapters, and this run "
      f"would not train them; {_how_to_train(frozen, config)}"
    )
  _check_shapes(start, model, shapes, where)
  return start


def _how_to_train(frozen: list[str], config) -> str:
  """Says how a run with adapters can train these parameters, or what to do if it cannot."""
  adapted = {"vision": config.lora.vision_rank, "language": config.lora.rank}
  keys = set()
  for path in frozen:
    part = "embeddings" if optimizer.group_of(path) == "embeddings" else path.split("/", 1)[0]
    if adapted.get(part):
      return "merge all of them (merge_and_unload in peft), and name the result as model.init_from"
    keys.add(f"config.train.{part}")
  return f"set {' and '.join(sorted(keys))} to true"


def _check_base(run: str, base: "ModelSource", where: str) -> None:
  """Refuses a run's adapters if `base` is not the weights that the run started from."""
  original = provenance.stored(run)
  if original is None:
    return
  if run in [directory for directory, _ in base.runs]:
    raise InputError(
      f"model.init_from={where} already has the adapters of lora.init_from={run}: they would be "
      "added twice; name what that run started from as model.init_from, or leave lora.init_from "
      "empty"
    )
  files, runs = original["files"], original["runs"]
  same_files = sorted(provenance.content(base)["files"].values()) == sorted(files.values())
  if not same_files or len(base.runs) != len(runs):
    started = [f"{directory}/checkpoints/{step}" for directory, step in runs]
    raise InputError(
      f"the adapters of lora.init_from={run} belong to other weights than model.init_from={where}; "
      f"name those: {', '.join(started or sorted(files))}"
    )


def _check_shapes(start: AdapterInit, model: vlm.ModelConfig, shapes, where: str) -> None:
  wrong = []
  for name in [*peft.names_of(model), *names.names_of(model)]:
    shape = names.tensor_shape(name.kind, shapes[name.path].shape[name.stacked :])
    layers = [start.tensors.get(name.tensor.format(i)) for i in names.layers_of(name, model)]
    wrong += [f"{t.name} is {t.shape}, not {shape}" for t in layers if t and t.shape != shape]
  if wrong:
    raise InputError(f"lora.init_from={where}: adapters of another model:\n  " + "\n  ".join(wrong))


def _compare(stored: dict, expected: dict, where: str) -> None:
  """Raises an InputError unless two dicts agree: path of a linear map -> (rank, scale)."""
  wrong = [f"{path}: no adapter there" for path in expected if path not in stored]
  for path, (rank, scale) in stored.items():
    if path not in expected:
      wrong.append(f"{path}: an adapter there, none by lora.targets")
      continue
    rank_here, scale_here = expected[path]
    if rank != rank_here:
      wrong.append(f"{path}: rank {rank} there, {rank_here} by lora.rank or lora.vision_rank")
    elif abs(scale / scale_here - 1) > 1e-6:
      wrong.append(f"{path}: scale {scale:g} there, {scale_here:g} by lora.alpha, lora.use_rslora")
  if wrong:
    raise InputError(
      f"lora.init_from={where}: its adapters differ from config.lora; correct the config:\n  "
      + "\n  ".join(wrong)
    )


def _open_run(directory: str, which: str):
  """Returns what `_open_peft` does, from a run's checkpoint."""
  config: Any = ConfigDict(run_directory.stored_config(directory))
  ranks = lora.from_group(config.lora)
  if ranks is None:
    raise InputError(
      f"lora.init_from={directory} is a run without adapters; name it as model.init_from"
    )
  step = checkpoints.find_step(directory, which, config.metric_for_best_model)
  trained = checkpoints.trained_paths(directory, step)
  adapted = [path.removesuffix("/lora_a") for path in trained if path.endswith("/lora_a")]
  stored = {path: (ranks.rank_of(path), ranks.scale(ranks.rank_of(path))) for path in adapted}
  fully_trained = [path for path in trained if not lora.is_adapter(path)]
  return AdapterInit(run=(directory, step)), stored, fully_trained


def _open_peft(directory: str, model: vlm.ModelConfig):
  """Returns (AdapterInit, path of a linear map -> its adapter's rank and scale, other paths)."""
  directories = peft.directories(directory)
  configs = {tower: peft.read_config(path) for tower, path in directories.items()}
  tensors = {}
  for path in directories.values():
    tensors |= peft.find_tensors(path)
  projector = os.path.join(directory, f"{hf_config.PROJECTOR}.safetensors")
  if os.path.isfile(projector):
    tensors |= read_headers(projector, names.canonical)
  table = peft.names_of(dataclasses.replace(model, lora=_everywhere(model)))
  adapters, others = (
    {name.tensor.format(i): name for name in part for i in names.layers_of(name, model)}
    for part in (table, names.names_of(model))
  )
  stored, fully_trained, used, wrong = {}, set(), {}, []
  for canonical, tensor in tensors.items():
    if canonical in adapters:
      used[canonical] = tensor
      path, kind = adapters[canonical].path.rsplit("/", 1)
      if kind == "lora_a" and len(tensor.shape) == 2:
        rank = tensor.shape[0]
        tower = "" if "" in configs else canonical.split(".", 1)[0]
        module = peft.module_name(canonical.removesuffix(".lora_A.weight"), model, tower)
        rank_and_scale = (rank, peft.scale(configs[tower], module, rank))
        if stored.setdefault(path, rank_and_scale) != rank_and_scale:
          wrong.append(f"{tensor.name}: its rank or scale differs from that of other layers")
    elif canonical in others:
      used[canonical] = tensor
      fully_trained.add(others[canonical].path)
    elif not names.is_unused(canonical, model):
      wrong.append(f"unexpected {tensor.name} {tensor.shape}")
  for path in stored:  # every layer must have both matrices
    pairs = [name for name in table if name.path.rsplit("/", 1)[0] == path]
    missing = [n.tensor.format(i) for n in pairs for i in names.layers_of(n, model)]
    wrong += [
      f"missing {peft.PREFIX}{peft.module_name(n, model)}" for n in missing if n not in used
    ]
  if wrong:
    raise InputError(
      f"lora.init_from={directory}: these are not adapters of this model:\n  " + "\n  ".join(wrong)
    )
  return AdapterInit(tensors=used), stored, fully_trained


def _everywhere(model: vlm.ModelConfig) -> lora.LoraConfig:
  """Returns a config with an adapter at every linear map."""
  assert model.lora is not None
  return dataclasses.replace(model.lora, rank=1, vision_rank=1, targets="")
