"""Where a run's adapters start from: a PEFT directory or a LoRA run, and what came beside them."""

import dataclasses
import os
from typing import TYPE_CHECKING

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
  """Adapters, and parameters that were trained whole beside them; one of both is empty.

  Attributes:
    tensors: canonical name -> tensor of a PEFT directory.
    run: a run directory with the checkpoint step to take all that it trained from.
  """

  tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
  run: tuple[str, int] | None = None


def open_start(config, model: vlm.ModelConfig, base: "ModelSource") -> AdapterInit | None:
  """Opens what `lora.init_from` names; reads configs and headers only.

  Args:
    config: of the run that the adapters are for.
    model: with the run's adapters.
    base: the weights that they are added to.

  Returns:
    None if `lora.init_from` is empty.

  Raises:
    InputError: it is missing or damaged; its adapters sit elsewhere, have another rank or count
      otherwise than the run's, or are a run's over other weights; or it brings parameters that the
      run does not train.
  """
  where = config.lora.init_from
  if not where:
    return None
  storage.check(where, "lora.init_from")
  shapes = trees.flatten(vlm.abstract_params(model)[1])
  own = {path: model.lora.rank_of(path) for path in lora.linear_maps(shapes)}
  own = {path: (rank, model.lora.scale(rank)) for path, rank in own.items() if rank}
  if run := checkpoints.find_run(where):
    start, found, beside = _open_run(*run, shapes)
    _check_base(start.run[0], base, config.model.init_from)
  else:
    start, found, beside = _open_peft(where, model)
  _compare(found, own, where)
  unknown = sorted(path for path in beside if path not in shapes)
  if unknown:
    raise InputError(
      f"lora.init_from={where}: {', '.join(unknown)} came beside its adapters, and this model has "
      "nothing such; export that model merged, and name it as model.init_from"
    )
  frozen = sorted(path for path in beside if not optimizer.is_trained(path, config))
  if frozen:
    raise InputError(
      f"lora.init_from={where}: {', '.join(frozen)} were trained beside its adapters, and this run "
      f"would not train them; {_mend(frozen, config)}"
    )
  _check_shapes(start, model, shapes, where)
  return start


def _mend(frozen: list[str], config) -> str:
  """How parameters can be trained beside adapters, or what to do where they cannot."""
  adapted = {"vision": config.lora.vision_rank, "language": config.lora.rank}
  keys = set()
  for path in frozen:
    part = "embeddings" if optimizer.group_of(path) == "embeddings" else path.split("/", 1)[0]
    if adapted.get(part):
      return "merge all of them (merge_and_unload in peft), and name the result as model.init_from"
    keys.add(f"config.train.{part}")
  return f"set {' and '.join(sorted(keys))} to true"


def _check_base(run: str, base: "ModelSource", where: str) -> None:
  """Refuses a run's adapters over weights that it did not start from."""
  own = provenance.stored(run)
  if own is None:
    return
  if run in [directory for directory, _ in base.runs]:
    raise InputError(
      f"model.init_from={where} has the adapters of lora.init_from={run} already: they would count "
      "twice; name what that run started from as model.init_from, or leave lora.init_from empty"
    )
  files = provenance.content(base)["files"]
  if sorted(files.values()) != sorted(own["files"].values()) or len(base.runs) != len(own["runs"]):
    started = [f"{directory}/checkpoints/{step}" for directory, step in own["runs"]]
    raise InputError(
      f"the adapters of lora.init_from={run} belong to other weights than model.init_from={where}; "
      f"name those: {', '.join(started or sorted(own['files']))}"
    )


def _check_shapes(start: AdapterInit, model: vlm.ModelConfig, shapes, where: str) -> None:
  wrong = []
  for name in [*peft.names_of(model), *names.names_of(model)]:
    expected = names.tensor_shape(name.kind, shapes[name.path].shape[name.stacked :])
    found = [start.tensors.get(name.tensor.format(i)) for i in names.layers_of(name, model)]
    wrong += [f"{t.name} is {t.shape}, not {expected}" for t in found if t and t.shape != expected]
  if wrong:
    raise InputError(f"lora.init_from={where}: adapters of another model:\n  " + "\n  ".join(wrong))


def _compare(found: dict, own: dict, where: str) -> None:
  """Both: path of a linear map -> (rank of its adapter, what it counts)."""
  wrong = [f"{path}: no adapter there" for path in own if path not in found]
  for path, (rank, scale) in found.items():
    if path not in own:
      wrong.append(f"{path}: an adapter there, none by lora.targets")
    elif rank != own[path][0]:
      wrong.append(f"{path}: rank {rank} there, {own[path][0]} by lora.rank or lora.vision_rank")
    elif abs(scale / own[path][1] - 1) > 1e-6:
      wrong.append(
        f"{path}: counts {scale:g} there, {own[path][1]:g} by lora.alpha and lora.use_rslora"
      )
  if wrong:
    raise InputError(
      f"lora.init_from={where}: its adapters are not as config.lora says; mend the config:\n  "
      + "\n  ".join(wrong)
    )


def _open_run(directory: str, which: str, shapes):
  config = ConfigDict(run_directory.stored_config(directory))
  ranks = lora.from_group(config.lora)
  if ranks is None:
    raise InputError(
      f"lora.init_from={directory} is a run without adapters; name it as model.init_from"
    )
  step = checkpoints.find_step(directory, which, config.metric_for_best_model)
  trained = checkpoints.trained_paths(directory, step)
  places = [path.removesuffix("/lora_a") for path in trained if path.endswith("/lora_a")]
  found = {path: (ranks.rank_of(path), ranks.scale(ranks.rank_of(path))) for path in places}
  beside = [path for path in trained if not lora.is_adapter(path)]
  return AdapterInit(run=(directory, step)), found, beside


def _open_peft(directory: str, model: vlm.ModelConfig):
  places = peft.directories(directory)
  configs = {tower: peft.read_config(place) for tower, place in places.items()}
  tensors = {}
  for place in places.values():
    tensors |= peft.find_tensors(place)
  projector = os.path.join(directory, f"{hf_config.PROJECTOR}.safetensors")
  if os.path.isfile(projector):
    tensors |= read_headers(projector, names.canonical)
  table = peft.names_of(dataclasses.replace(model, lora=_everywhere(model)))
  adapters, wholes = (
    {name.tensor.format(i): name for name in part for i in names.layers_of(name, model)}
    for part in (table, names.names_of(model))
  )
  found, beside, used, wrong = {}, set(), {}, []
  for canonical, tensor in tensors.items():
    if canonical in adapters:
      used[canonical] = tensor
      path, kind = adapters[canonical].path.rsplit("/", 1)
      if kind == "lora_a" and len(tensor.shape) == 2:
        rank = tensor.shape[0]
        tower = "" if "" in configs else canonical.split(".", 1)[0]
        module = peft.module_name(canonical.removesuffix(".lora_A.weight"), tower)
        here = (rank, peft.scale(configs[tower], module, rank))
        if found.setdefault(path, here) != here:
          wrong.append(f"{tensor.name}: rank or scale is not that of the layers before")
    elif canonical in wholes:
      used[canonical] = tensor
      beside.add(wholes[canonical].path)
    elif not names.is_unused(canonical, model):
      wrong.append(f"unexpected {tensor.name} {tensor.shape}")
  for path in found:  # each of all layers, and both halves
    pairs = [name for name in table if name.path.rsplit("/", 1)[0] == path]
    missing = [n.tensor.format(i) for n in pairs for i in names.layers_of(n, model)]
    wrong += [f"missing {peft.PREFIX}{peft.module_name(n)}" for n in missing if n not in used]
  if wrong:
    raise InputError(
      f"lora.init_from={directory}: these are not adapters of this model:\n  " + "\n  ".join(wrong)
    )
  return AdapterInit(tensors=used), found, beside


def _everywhere(model: vlm.ModelConfig) -> lora.LoraConfig:
  return dataclasses.replace(model.lora, rank=1, vision_rank=1, targets="")
