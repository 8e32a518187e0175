"""Writes a trained model as a Hugging Face directory.

With the `mlp` projector LlavaForConditionalGeneration, or the class of the model's family
(`families`), loads the result. transformers has neither
the other projectors nor multi-modal causal attention: a model with these is written in a layout
that this code reads again, and whose towers transformers loads.

    config.json            as LLaVA's, with "architectures": ["VlalignForConditionalGeneration"],
                           "projector_type" and "mmca"
    projector.safetensors  the projector's tensors, multi_modal_projector.*, see `names`
    vision/                the vision tower, for CLIPVisionModel or the class of its type, and its
                           image processor
    language/              the language model, for LlamaForCausalLM or the class of its type, and
                           its tokenizer; for a reward model LlamaForSequenceClassification

A reward model has `score.weight` [1, D] in place of the language head, read at an answer's last
token, and the architecture "LlavaForSequenceClassification", by the naming rule of transformers.

Parameters that were not trained are copied from the source's files, and so are the layers that are
never run (see `copied`). Only what no model class has as a weight is left out: the text tower of a
full CLIP or SigLIP, a head that is tied or replaced by a score head, and the buffers position_ids
and inv_freq of old files.
"""

import contextlib
import copy
import json
import os
import shutil

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from vlalign_jax import json_files, trees
from vlalign_jax.data import jinja_template, templates
from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.weights import copied, families, names, towers
from vlalign_jax.weights.hf_config import OWN_FAMILY, PROJECTOR, REWARD_ARCHITECTURE, TOWERS
from vlalign_jax.weights.parts import ModelSource, with_ends

MAX_SHARD_BYTES = 5 * 10**9
_SCORE_LABELS = {"id2label": {"0": "score"}, "label2id": {"score": 0}}


def save_model_files(
  source: ModelSource,
  directory: str,
  dtype: str,
  template: str | None = None,
  *,
  vision_dtype: str | None = None,
) -> None:
  """Writes everything but the weights: config, generation config, tokenizer, processor.

  Args:
    source: the model.
    directory: created if it does not exist; files there are overwritten.
    dtype: of the weights by config.json, such as "bfloat16".
    template: the prompt template of training. It becomes the tokenizer's chat template, and its end
      tokens are added to the generation config; None leaves both as they are. "plain", which is for
      training before any chat, keeps an existing chat template.
    vision_dtype: of the vision tower's weights; None: as in the source's config.
  """
  _save_tokenizer(source, directory, template)
  source.images.save(directory)
  json_files.write(os.path.join(directory, "config.json"), _config(source, dtype, vision_dtype))
  if source.config.projector.kind == "perceiver":
    return  # transformers' processor counts patches
  processor = families.processor_config(source.config)
  json_files.write(os.path.join(directory, "processor_config.json"), processor)
  for name, content in source.other_files.items():
    json_files.write(os.path.join(directory, name), content)


def _save_tokenizer(source: ModelSource, directory: str, template: str | None) -> None:
  """Writes the tokenizer and the generation config, see `save_model_files`."""
  os.makedirs(directory, exist_ok=True)
  tokenizer = source.tokenizer
  generation = source.generation
  if template is not None:
    generation = with_ends(generation, templates.end_tokens(template, tokenizer))
    if template != "plain" or not tokenizer.chat_template:
      tokenizer = copy.deepcopy(tokenizer)
      tokenizer.chat_template = jinja_template.chat_template(template, tokenizer)
  tokenizer.save_pretrained(directory)
  _name_tokenizer_for_version_4(os.path.join(directory, "tokenizer_config.json"))
  generation.save_pretrained(directory)


def _config(source: ModelSource, dtype: str, vision_dtype: str | None) -> dict:
  """Returns the content of config.json."""
  config, tower = source.config, copied.tower_of(source)
  hf = source.hf.to_dict()
  hf["vision_config"] = source.hf.to_diff_dict()["vision_config"]  # without defaults
  for part in (hf, hf["text_config"], hf["vision_config"]):
    part.pop("_name_or_path", None)  # a local directory
  hf["text_config"] |= _version_4_rope(hf["text_config"]["rope_parameters"])
  hf["vision_config"]["num_hidden_layers"] = tower.layers
  if (head_key := towers.of(config.vision).head_key) and not tower.head:
    hf["vision_config"][head_key] = False
  if tower.feature_layer is not None:
    hf["vision_feature_layer"] = tower.feature_layer
  if "image_seq_length" in hf:
    hf["image_seq_length"] = config.tokens_per_image
  hf["dtype"] = hf["text_config"]["dtype"] = dtype
  if vision_dtype and hf["vision_config"].get("dtype"):  # else the dtype of the model applies
    hf["vision_config"]["dtype"] = vision_dtype
  family = families.of(config).name if families.in_transformers(config) else OWN_FAMILY
  hf["architectures"] = [f"{family}ForConditionalGeneration"]
  for key in ("projector_type", "mmca"):
    hf.pop(key, None)
  if family == OWN_FAMILY:
    hf |= {"projector_type": config.projector.kind, "mmca": config.mmca}
  if config.head == SCORE:
    hf |= {"architectures": [f"{family}{REWARD_ARCHITECTURE}"], **_SCORE_LABELS}
  return hf


def _save_parts(source: ModelSource, directory: str, dtype: str, vision_dtype: str | None) -> None:
  """Writes everything but the weights into the directories of the towers."""
  hf, configs = _config(source, dtype, vision_dtype), {}
  for tower, key in (("vision", "vision_config"), ("language", "text_config")):
    os.makedirs(os.path.join(directory, tower))
    configs[tower] = hf[key] | {"transformers_version": hf["transformers_version"]}
  configs["vision"]["architectures"] = [towers.of(source.config.vision).architecture]
  if vision_dtype:
    configs["vision"]["dtype"] = vision_dtype
  family = type(source.hf.text_config).__name__.removesuffix("Config")
  configs["language"] |= {
    "architectures": [f"{family}ForCausalLM"],
    "pad_token_id": source.tokenizer.pad_token_id,
    "tie_word_embeddings": source.config.language.tied_embeddings,
  }
  if source.config.head == SCORE:
    configs["language"] |= {"architectures": [f"{family}{REWARD_ARCHITECTURE}"], **_SCORE_LABELS}
  for tower, content in configs.items():
    json_files.write(os.path.join(directory, tower, "config.json"), content)
  source.images.save(os.path.join(directory, "vision"))
  _save_tokenizer(source, os.path.join(directory, "language"), None)


def _name_tokenizer_for_version_4(path: str) -> None:
  """Replaces the class of a tokenizer that transformers 4 lacks by one that 4 and 5 load."""
  with open(path, encoding="utf-8") as file:
    config = json.load(file)
  if config.get("tokenizer_class") == "TokenizersBackend":
    json_files.write(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _version_4_rope(rope: dict) -> dict:
  """Returns RoPE in the keys of transformers 4, which does not read `rope_parameters`."""
  scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
  plain = scaling["rope_type"] == "default"
  return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


def check_output(output: str) -> None:
  """Raises an InputError if `output` is a directory that is not empty."""
  if os.path.isdir(output) and os.listdir(output):
    raise InputError(f"{output} is not empty; choose another output directory or empty it")


def export_model(
  source: ModelSource,
  params,
  output: str,
  *,
  dtype: np.dtype | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a Hugging Face directory, completely or not at all.

  Parameters that `params` lacks are copied from the source's files, and so are the tensors of the
  vision tower that are never run: without `dtype` bit by bit, with `dtype` converted once from the
  stored values. Every process must call this; process 0 writes.

  Args:
    source: the model that was trained.
    params: nested dict of (sharded) arrays, at least of all trained parameters.
    output: a directory that does not exist yet or is empty.
    dtype: of all written weights; None: each keeps its dtype. config.json names `dtype`, or that of
      `params`; transformers then loads all weights in it.
    max_shard_bytes: maximum size of a file; a larger tensor has a file to itself.

  Raises:
    InputError: `output` is not empty.
  """
  flat = trees.flatten(params)
  dtype_name = np.dtype(dtype or next(iter(flat.values())).dtype).name
  keeps_vision = dtype is None and not any(path.startswith("vision/") for path in flat)
  vision_dtype = None if keeps_vision else dtype_name
  with appearing(output) as partial:
    if partial:
      save_model_files(source, partial, dtype_name, vision_dtype=vision_dtype)
    table = names.names_of(source.config)
    if families.in_transformers(source.config):
      tensors = _tensors(source, table, flat, dtype, names.exported, bool(partial))
      _save_weights(tensors, partial, max_shard_bytes)
      return
    if partial:
      _save_parts(source, partial, dtype_name, vision_dtype)
    for part, prefixes in {"": f"{PROJECTOR}/", **TOWERS}.items():
      part_table = [name for name in table if name.path.startswith(prefixes)]
      tensors = _tensors(source, part_table, flat, dtype, names.exported_part, bool(partial))
      directory = partial and os.path.join(partial, part)
      _save_weights(tensors, directory, max_shard_bytes, "model" if part else PROJECTOR)


@contextlib.contextmanager
def appearing(output: str):
  """Yields a directory to write to, which is renamed to `output` when the block ends.

  Every process must enter; process 0 gets the directory, the others None.

  Raises:
    InputError: `output` is not empty.
  """
  check_output(output)
  partial = output.rstrip("/") + ".partial" if jax.process_index() == 0 else None
  if partial:
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
  yield partial
  if partial:
    if os.path.isdir(output):
      os.rmdir(output)
    os.rename(partial, output)


def _save_weights(
  tensors, directory: str | None, max_shard_bytes: int, stem: str = "model"
) -> None:
  """Writes (name, tensor) pairs to shards; without a directory only iterates over them."""
  shard, shard_bytes, total, shards = {}, 0, 0, []

  def flush():
    name = f"shard-{len(shards)}"
    if directory:
      save_file(shard, os.path.join(directory, name), metadata={"format": "pt"})
    shards.append((name, list(shard)))

  for name, tensor in tensors:
    if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
      flush()
      shard, shard_bytes = {}, 0
    shard[name] = tensor
    shard_bytes += tensor.nbytes
    total += tensor.nbytes
  flush()
  if directory:
    _name_shards(directory, shards, total, stem)


def _name_shards(directory: str, shards: list[tuple[str, list[str]]], total: int, stem: str):
  if len(shards) == 1:
    os.rename(os.path.join(directory, shards[0][0]), os.path.join(directory, f"{stem}.safetensors"))
    return
  weight_map = {}
  for number, (temporary, tensors) in enumerate(shards, 1):
    final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    os.rename(os.path.join(directory, temporary), os.path.join(directory, final))
    weight_map |= dict.fromkeys(tensors, final)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  json_files.write(os.path.join(directory, f"{stem}.safetensors.index.json"), index)


def _tensors(source: ModelSource, table: list[names.Name], flat, dtype, exported, writes: bool):
  """Yields (name by `exported`, tensor) of a model or a part of it, one at a time.

  A process that does not write only takes part in gathering.
  """
  for name, tensor in gather([name for name in table if name.path in flat], flat, dtype):
    yield exported(name, source.config), tensor
  if not writes:
    return
  for name, tensor in copied.untrained(source, {n.path for n in table} - flat.keys(), dtype):
    yield exported(name, source.config), tensor
  if any(name.path.startswith("vision/") for name in table):
    for name, tensor in _unused(source, dtype or next(iter(flat.values())).dtype, dtype):
      yield exported(name, source.config), tensor


def _unused(source: ModelSource, identity_dtype, dtype: np.dtype | None):
  """Yields (canonical name, tensor) of the vision tower behind its last used layer."""
  tower, layers = copied.tower_of(source), source.hf.vision_config.num_hidden_layers
  if tower.layers < layers:
    logging.warning(
      "the source's config says that its vision tower has %d layers, but its files lack layer %d: "
      "the exported tower has %d layers and vision_feature_layer %s",
      layers,
      tower.layers,
      tower.layers,
      tower.feature_layer,
    )
  if towers.head_of(source.config.vision, source.hf.vision_config) and not tower.head:
    logging.warning(
      "the source's config says that its vision tower has a pooling head, but its files lack it: "
      "the exported tower has none"
    )
  for name, tensor in tower.unused.items():
    yield name, copied.as_stored(tensor.read(), dtype)
  if (
    towers.of(source.config.vision).has_post_norm and not tower.has_post_norm
  ):  # LLaVA never applies it, but transformers expects it
    logging.warning("the source has no post_layernorm; the identity is written in its place")
    for name, value in zip(copied.POST_NORM, (1, 0), strict=True):
      yield name, np.full((source.config.vision.width,), value, identity_dtype)


def gather(table: list[names.Name], flat, dtype: np.dtype | None):
  """Yields (canonical name, tensor) one at a time; each is gathered from its devices only then.

  Args:
    table: the parameters.
    flat: path -> array.
    dtype: of the tensors; None: that of the arrays.
  """
  for name in table:
    param = flat[name.path]
    layers = range(param.shape[0]) if name.stacked else (None,)
    for layer in layers:
      local = param if layer is None else param[layer]
      if not local.is_fully_addressable:
        local = multihost_utils.process_allgather(local, tiled=True)
      tensor = names.to_tensor(name.kind, np.asarray(local))
      yield name.tensor.format(layer), copied.as_stored(tensor, dtype)
