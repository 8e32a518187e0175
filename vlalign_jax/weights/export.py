"""A trained model as a Hugging Face directory.

With the `mlp` projector the result is what LlavaForConditionalGeneration loads. Other projectors
and multi-modal causal attention are unknown to transformers: such a model has a layout of its own,
which imports again here, and whose towers transformers loads.

    config.json            as LLaVA's, with "architectures": ["VlalignForConditionalGeneration"],
                           "projector_type" and, if it is so, "mmca": true
    projector.safetensors  the projector's tensors, multi_modal_projector.*, see `names`
    vision/                the vision tower, for CLIPVisionModel, and its image processor
    language/              the language model, for LlamaForCausalLM or as its kind is called, with
                           tokenizer; of a reward model for LlamaForSequenceClassification

A reward model has `score.weight` [1, D] in place of the language head, read at an answer's last
token, and "LlavaForSequenceClassification", as transformers would call it if it had one.

What was not trained is copied from the source's files, with what is never run (see `copied`). Left
out is only what no model class holds as a weight: the rest of a full CLIP, a head that is tied or
that a score replaces, and the buffers position_ids and inv_freq of old files.
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
from vlalign_jax.models.vlm import SCORE, ModelConfig
from vlalign_jax.weights import copied, names
from vlalign_jax.weights.hf_config import OWN_FAMILY, PROJECTOR, REWARD_ARCHITECTURE, TOWERS
from vlalign_jax.weights.parts import IMAGE_TOKEN, ModelSource, with_ends

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
    directory: is made if need be; files there are overwritten.
    dtype: what config.json says the weights are, such as "bfloat16".
    template: the prompt template of training, which becomes the tokenizer's chat template, and its
      end tokens those of the generation config; None leaves both as they are. "plain", a stage
      before the one that chats, keeps a chat template that is there.
    vision_dtype: the same as dtype, of the vision tower; None: what the source's config says.
  """
  _save_tokenizer(source, directory, template)
  source.images.save(directory)
  json_files.write(os.path.join(directory, "config.json"), _config(source, dtype, vision_dtype))
  if source.config.projector.kind == "perceiver":
    return  # transformers' processor counts patches
  vision = source.config.vision
  processor = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE_TOKEN,
    "num_additional_image_tokens": 1,
    "patch_size": vision.patch_size,
    "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
  }
  json_files.write(os.path.join(directory, "processor_config.json"), processor)


def _save_tokenizer(source: ModelSource, directory: str, template: str | None) -> None:
  """Tokenizer and generation config."""
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


def is_llava(config: ModelConfig) -> bool:
  """Whether transformers has a class for the model."""
  return config.projector.kind == "mlp" and not config.mmca


def _config(source: ModelSource, dtype: str, vision_dtype: str | None) -> dict:
  """The content of config.json."""
  config, tower = source.config, copied.tower_of(source)
  hf = source.hf.to_dict()
  hf["vision_config"] = source.hf.to_diff_dict()["vision_config"]  # in the words of the source
  for part in (hf, hf["text_config"], hf["vision_config"]):
    part.pop("_name_or_path", None)  # a directory of this machine
  hf["text_config"] |= _version_4_rope(hf["text_config"]["rope_parameters"])
  hf["vision_config"]["num_hidden_layers"] = tower.layers
  hf["vision_feature_layer"] = tower.feature_layer
  hf["image_seq_length"] = config.tokens_per_image
  hf["dtype"] = hf["text_config"]["dtype"] = dtype
  if vision_dtype and hf["vision_config"].get("dtype"):  # else the model's own counts
    hf["vision_config"]["dtype"] = vision_dtype
  family = "Llava" if is_llava(config) else OWN_FAMILY
  hf["architectures"] = [f"{family}ForConditionalGeneration"]
  for key in ("projector_type", "mmca"):
    hf.pop(key, None)
  if family == OWN_FAMILY:
    hf |= {"projector_type": config.projector.kind, "mmca": config.mmca}
  if config.head == SCORE:
    hf |= {"architectures": [f"{family}{REWARD_ARCHITECTURE}"], **_SCORE_LABELS}
  return hf


def _save_parts(source: ModelSource, directory: str, dtype: str, vision_dtype: str | None) -> None:
  """Writes everything but the weights of the towers' own directories."""
  hf, own = _config(source, dtype, vision_dtype), {}
  for part, key in (("vision", "vision_config"), ("language", "text_config")):
    os.makedirs(os.path.join(directory, part))
    own[part] = hf[key] | {"transformers_version": hf["transformers_version"]}
  own["vision"]["architectures"] = ["CLIPVisionModel"]
  if vision_dtype:
    own["vision"]["dtype"] = vision_dtype
  kind = type(source.hf.text_config).__name__.removesuffix("Config")
  own["language"] |= {
    "architectures": [f"{kind}ForCausalLM"],
    "pad_token_id": source.tokenizer.pad_token_id,
    "tie_word_embeddings": source.config.language.tied_embeddings,
  }
  if source.config.head == SCORE:
    own["language"] |= {"architectures": [f"{kind}{REWARD_ARCHITECTURE}"], **_SCORE_LABELS}
  for part, content in own.items():
    json_files.write(os.path.join(directory, part, "config.json"), content)
  source.images.save(os.path.join(directory, "vision"))
  _save_tokenizer(source, os.path.join(directory, "language"), None)


def _name_tokenizer_for_version_4(path: str) -> None:
  """transformers 5 names a class that version 4 lacks; both load the older name."""
  with open(path, encoding="utf-8") as file:
    config = json.load(file)
  if config.get("tokenizer_class") == "TokenizersBackend":
    json_files.write(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _version_4_rope(rope: dict) -> dict:
  """RoPE in the keys of transformers 4, which does not know `rope_parameters`."""
  scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
  plain = scaling["rope_type"] == "default"
  return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


def check_output(output: str) -> None:
  """Raises an InputError if there is something at `output` already."""
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
  """Writes a complete Hugging Face directory; it appears whole or not at all.

  A parameter that `params` lacks is copied from the source's files, and so are the tensors of the
  vision tower that are never run. Without `dtype` they have the same bits as there, in their own
  dtype; with it they are converted once, from what is stored.

  Args:
    source: the model that was trained.
    params: nested dict of (sharded) arrays, at least of all that was trained; every process must
      call, process 0 writes.
    output: a directory that does not exist yet or is empty.
    dtype: of all written weights; None: each as it is. config.json names `dtype`, or that of
      `params`, in which transformers then loads all of them.
    max_shard_bytes: a file holds more only if one tensor alone does.

  Raises:
    InputError: `output` holds something already.
  """
  flat = trees.flatten(params)
  kind = np.dtype(dtype or next(iter(flat.values())).dtype).name
  own_vision = dtype is None and not any(path.startswith("vision/") for path in flat)
  vision_kind = None if own_vision else kind
  with appearing(output) as partial:
    if partial:
      save_model_files(source, partial, kind, vision_dtype=vision_kind)
    table = names.names_of(source.config)
    if is_llava(source.config):
      tensors = _tensors(source, table, flat, dtype, names.exported, bool(partial))
      _save_weights(tensors, partial, max_shard_bytes)
      return
    if partial:
      _save_parts(source, partial, kind, vision_kind)
    for part, prefixes in {"": f"{PROJECTOR}/", **TOWERS}.items():
      own = [name for name in table if name.path.startswith(prefixes)]
      tensors = _tensors(source, own, flat, dtype, names.exported_part, bool(partial))
      place = partial and os.path.join(partial, part)
      _save_weights(tensors, place, max_shard_bytes, "model" if part else PROJECTOR)


@contextlib.contextmanager
def appearing(output: str):
  """A directory to write to, which is called `output` once all is written.

  Every process must enter; the first is given the directory, the others None.

  Raises:
    InputError: `output` holds something already.
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
  """Writes (name, tensor) pairs to shards; without a directory only takes them."""
  weight_map, shard, shard_bytes, shards = {}, {}, 0, []

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
    weight_map[name] = tensor.nbytes
  flush()
  if directory:
    _name_shards(directory, shards, sum(weight_map.values()), stem)


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
  """(name as `exported` has it, tensor) of a model or a part of it, one at a time.

  A process that does not write takes part in gathering only.
  """
  for name, tensor in gather([name for name in table if name.path in flat], flat, dtype):
    yield exported(name), tensor
  if not writes:
    return
  for name, tensor in copied.untrained(source, {n.path for n in table} - flat.keys(), dtype):
    yield exported(name), tensor
  if any(name.path.startswith("vision/") for name in table):
    for name, tensor in _unused(source, dtype or next(iter(flat.values())).dtype, dtype):
      yield exported(name), tensor


def _unused(source: ModelSource, identity_dtype, dtype: np.dtype | None):
  """(canonical name, tensor) of the vision tower's layers that are not run, and post_layernorm."""
  tower, layers = copied.tower_of(source), source.hf.vision_config.num_hidden_layers
  if tower.layers < layers:
    logging.warning(
      "the source's config says that its vision tower has %d layers; layer %d is not in its files, "
      "so the exported tower has %d, with vision_feature_layer %s",
      layers,
      tower.layers,
      tower.layers,
      tower.feature_layer,
    )
  for name, tensor in tower.unused.items():
    yield name, copied.as_stored(tensor.read(), dtype)
  if not tower.has_post_norm:  # LLaVA never applies it, but transformers wants it
    logging.warning("the source has no post_layernorm; it is written as the identity")
    for name, value in zip(copied.POST_NORM, (1, 0), strict=True):
      yield name, np.full((source.config.vision.width,), value, identity_dtype)


def gather(table: list[names.Name], flat, dtype: np.dtype | None):
  """(canonical name, tensor) one at a time, each gathered from its devices when asked for.

  Args:
    table: the parameters.
    flat: path -> array.
    dtype: of the tensors; None: of the arrays.
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
