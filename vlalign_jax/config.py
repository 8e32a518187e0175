"""The configuration that every stage shares: its keys with their defaults, and their checks."""

import difflib
import math
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from vlalign_jax.config_checks import Config, check_at_least, check_choices, check_seed, value
from vlalign_jax.data.placeholders import PLACEHOLDERS
from vlalign_jax.errors import InputError
from vlalign_jax.models.backends import ATTENTION_NAMES
from vlalign_jax.models.stack import REMAT_NAMES
from vlalign_jax.writers import choose as writers

DTYPES = ("float32", "bfloat16", "float16")
# Sums of small updates need more than float16 has.
PARAM_DTYPES = ("float32", "bfloat16")
DATA_CHOICES = {"data.on_bad_record": ("error", "skip"), "data.placeholders": PLACEHOLDERS}
SCHEDULES = (
  "linear",
  "cosine",
  "cosine_with_restarts",
  "polynomial",
  "constant",
  "constant_with_warmup",
)


def shared() -> Config:
  """Returns the keys that all training stages have, with their defaults.

  The comments are the meanings in docs/configuration.md, which scripts/config_tables.py writes.
  """
  c: Config = ConfigDict()
  c.seed = 1234  # seed of the order of records, of sampling and of new weights
  c.max_steps = -1  # number of steps; -1: num_train_epochs decides
  c.num_train_epochs = 1.0  # passes over the training data; may be a fraction
  # Examples per step, over all devices and micro-batches (PPO: prompts per rollout).
  c.batch_size = 128
  # Micro-batches that batch_size is SPLIT into; it does not multiply batch_size as in transformers.
  # The update stays the same: the loss is divided by what the whole batch counts.
  c.grad_accumulation = 1
  c.log_every = 10  # steps between log lines
  c.eval_every = 0  # steps between evaluations; 0: only at the end
  c.save_every = 500  # steps between checkpoints; 0: only at the end
  c.save_total_limit = 2  # how many of the newest checkpoints are kept
  c.save_best_limit = 0  # how many of the best are kept as well; above 0, each evaluation is saved
  c.metric_for_best_model = "eval/loss"  # evaluation metric that ranks the checkpoints

  c.model = ConfigDict()
  # Model to start from: a LLaVA directory (in Hugging Face's layout or that of LLaVA's repository),
  # a run directory, or a PEFT directory whose adapter_config.json names its base. Empty:
  # model.vision and model.language are joined to a new model.
  c.model.init_from = ""
  c.model.vision = ""  # CLIP or SigLIP directory of a new model
  c.model.language = ""  # LLaMA, Qwen2, Qwen3 or Mistral directory of a new model
  # Published sizes that scripts/plan.py takes while no weights are named, see weights/published.py.
  # Training ignores it.
  c.model.architecture = ""
  # Projector of a new model: mlp, linear (linear map and LayerNorm), vit (one more layer of the
  # tower before that) or perceiver (256 embeddings per image, whatever its size).
  c.model.projector = "mlp"
  # Layer of the tower that a new model reads, as in transformers; several: comma-separated.
  c.model.vision_feature_layer = "-2"
  # Embeddings of the tower that a new model reads: default (without the class token) or full;
  # SigLIP has no class token and needs full.
  c.model.vision_feature_select_strategy = "default"
  # Multi-modal causal attention: text and images have a softmax each, and an image token sees no
  # other image token. A model that has it keeps it.
  c.model.mmca = False
  # Type of activations, matrix products and frozen parameters: float32, bfloat16, or float16 (the
  # loss is then scaled dynamically).
  c.model.dtype = "bfloat16"
  c.model.param_dtype = "float32"  # type of trained parameters: float32 or bfloat16
  # What the backward pass computes again: full (everything), save_matmuls (all but matrix
  # products), save_weight_matmuls (all but products with weights), none (nothing).
  c.model.remat = "full"
  # Attention kernel: auto (the fastest that can be used; the log says why), tiles (plain JAX),
  # cudnn (NVIDIA GPUs), splash (TPUs).
  c.model.attention = "auto"

  c.train = ConfigDict()
  c.train.vision = False  # whether to train the vision tower
  c.train.projector = True  # whether to train the projector
  c.train.language = True  # whether to train the language model
  # Whether to train the token embedding; none: as train.language.
  c.train.embeddings = config_dict.placeholder(bool)

  c.lora = ConfigDict()
  # Rank of the adapters that are trained in place of the language model's weights; 0: no adapters.
  c.lora.rank = 0
  c.lora.vision_rank = 0  # the same for the vision tower
  c.lora.alpha = 16.0  # the output of an adapter is multiplied by alpha / rank
  c.lora.dropout = 0.0  # share of an adapter's inputs that is dropped
  c.lora.use_rslora = False  # multiply by alpha / sqrt(rank) instead (rank-stabilized LoRA)
  # Regular expression that is searched in the paths of linear maps, such as
  # language/layers/attention/query, vision/layers/mlp/up, projector/first.
  c.lora.targets = "/layers/"
  c.lora.init_from = ""  # PEFT directory or LoRA run that the adapters start from

  c.data = ConfigDict()
  # Files to learn from, comma-separated: JSON, JSON lines, Parquet (also a directory or a pattern),
  # or a directory of datasets' save_to_disk.
  c.data.train = ""
  c.data.samples = ""  # records taken from each file: one number, or one per file; empty: all
  c.data.repeats = ""  # how often an epoch shows each file, such as 1,0.5; empty: once
  # SFT: how many records of a file, chosen by seed, are joined into one conversation with all their
  # images.
  c.data.concatenate = 1
  c.data.eval = ""  # files to evaluate on, comma-separated
  c.data.eval_samples = ""  # records taken from each file of data.eval, as data.samples
  c.data.eval_fraction = 0.0  # share of data.train that is held out if data.eval is empty
  c.data.images = ""  # directory of the pictures; empty: the directory of the data file
  # Directory to which pictures inside of data files are copied, once; empty:
  # ~/.cache/vlalign_jax/pictures.
  c.data.cache = ""
  # Where <image> and the pictures of a record do not match: match (an error) or first (take all
  # <image> out and put the pictures before the first question).
  c.data.placeholders = "match"
  c.data.template = "vicuna"  # prompt template, see docs/data.md
  c.data.max_length = 2048  # longest row in tokens, image tokens included
  c.data.max_candidates = 8  # most ranked answers of a record
  # Most images of a row, or tiles of them in models that cut pictures; none: no limit.
  c.data.max_images = config_dict.placeholder(int)
  c.data.image_aspect = "auto"  # crop, pad (to a square) or auto (as the image processor says)
  c.data.blank_images = False  # gray pictures: the baseline of a model that cannot see
  c.data.shuffle = True  # whether each epoch has an order of its own
  c.data.pack = True  # whether a row may hold several examples, which do not see each other
  c.data.workers = 0  # processes that decode pictures ahead; 0: threads of this process
  # What to do with bad records and unreadable pictures: error, or skip (leave out and count them).
  c.data.on_bad_record = "error"
  c.data.max_bad_records = 0.01  # with skip: the share of bad records that ends a run

  c.optim = ConfigDict()
  c.optim.learning_rate = 2e-5  # highest learning rate of AdamW
  # The same for the token embedding; none: learning_rate.
  c.optim.embedding_learning_rate = config_dict.placeholder(float)
  # The same for the projector; none: learning_rate.
  c.optim.projector_learning_rate = config_dict.placeholder(float)
  # The same for the vision tower, if it is trained; none: learning_rate.
  c.optim.vision_learning_rate = config_dict.placeholder(float)
  c.optim.weight_decay = 0.0  # AdamW's decay of matrices; norms and biases never decay
  c.optim.b1 = 0.9  # AdamW's beta 1 (adam_beta1 in transformers)
  c.optim.b2 = 0.95  # AdamW's beta 2 (adam_beta2 in transformers)
  c.optim.eps = 1e-8  # AdamW's epsilon (adam_epsilon in transformers)
  # Share of the updates in which the rate rises from 0; the first of them has rate 0.
  c.optim.warmup_ratio = 0.03
  c.optim.warmup_steps = 0  # number of these updates; above 0 it replaces warmup_ratio
  # Course of the learning rate, as in transformers: linear, cosine, cosine_with_restarts,
  # polynomial, constant, constant_with_warmup.
  c.optim.schedule = "cosine"
  c.optim.cycles = 1  # number of cycles of cosine_with_restarts
  c.optim.power = 1.0  # exponent of polynomial
  c.optim.max_grad_norm = 1.0  # global norm that gradients are clipped to; 0: no clipping

  c.mesh = ConfigDict()
  # What mesh.fsdp splits: 0 nothing, 1 the optimizer's state, 2 gradients as well, 3 parameters as
  # well.
  c.mesh.zero_stage = 0
  c.mesh.data = -1  # devices that split the batch; -1: those that the other axes leave
  # Devices that split the batch, and the states that mesh.zero_stage names (prediction: the
  # parameters).
  c.mesh.fsdp = 1
  c.mesh.tensor = 1  # devices that split attention heads, MLPs and the vocabulary
  # Keep the optimizer's state in the memory of the hosts, where devices reach it.
  c.mesh.offload_optimizer = False

  c.log = ConfigDict()
  # What shows the numbers of metrics.jsonl as well: tensorboard, wandb, trackio, several of them
  # comma-separated, or none.
  c.log.writers = "tensorboard"
  c.log.project = "vlalign_jax"  # project at wandb and trackio
  c.log.name = ""  # name of the run there; empty: the last part of workdir
  return c


def check_keys(config: Config, known: Config, prefix: str = "config") -> None:
  """Refuses keys that `known` lacks, keys that are missing, and values of another type.

  Raises:
    InputError: names the first such key.
  """
  for key in config:
    if key not in known:
      raise InputError(unknown_key(f"{prefix}.{key}", [f"{prefix}.{name}" for name in known]))
    if isinstance(known[key], ConfigDict):
      if not isinstance(config[key], ConfigDict):
        raise InputError(f"{prefix}.{key} is a group of keys, not {config[key]!r}")
      check_keys(config[key], known[key], f"{prefix}.{key}")
    else:
      _check_type(f"{prefix}.{key}", config[key], known.get_type(key), known[key])
  for key in known:
    if key not in config:
      raise InputError(f"{prefix}.{key} is missing; build the config from the stage's get_config")


def unknown_key(name: str, known: list[str]) -> str:
  """Returns the message for a key that no config has, with the nearest one that exists."""
  last = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
  near = difflib.get_close_matches(name, known, 1, 0.8)
  near = near or [last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)]
  near = near or difflib.get_close_matches(name, known, 1, 0.0)
  return f"unknown key {name}; did you mean {near[0]}?"


def _check_type(name: str, given: Any, kind: type, default) -> None:
  if given is None and default is None:  # a placeholder, which stays empty
    return
  # type(), not isinstance(): True is not a number here.
  if type(given) is not kind and (kind, type(given)) != (float, int):
    raise InputError(f"{name} is {given!r}; it must be of type {kind.__name__}")
  if kind is float and given is not None and not math.isfinite(given):
    raise InputError(f"{name} is {given}; give a finite number")


def check_shared(config: Config, metrics: tuple[str, ...]) -> None:
  """Refuses values of the shared keys that no run can have.

  Args:
    config: of a run.
    metrics: what the stage's evaluation reports.

  Raises:
    InputError: names the key, its value and what it may be.
  """
  choices = {
    "metric_for_best_model": metrics,
    "model.dtype": DTYPES,
    "model.param_dtype": PARAM_DTYPES,
    "model.remat": REMAT_NAMES,
    "model.attention": ATTENTION_NAMES,
    "optim.schedule": SCHEDULES,
    **DATA_CHOICES,
    "mesh.zero_stage": (0, 1, 2, 3),
  }
  at_least = {
    "batch_size": 1,
    "grad_accumulation": 1,
    "log_every": 1,
    "save_total_limit": 1,
    "save_best_limit": 0,
    "max_steps": -1,
    "eval_every": 0,
    "save_every": 0,
    "data.max_length": 2,
    "data.max_candidates": 2,
    "data.concatenate": 1,
    "data.max_images": 1,
    "data.workers": 0,
    "data.eval_fraction": 0,
    "data.max_bad_records": 0,
    "lora.rank": 0,
    "lora.vision_rank": 0,
    "optim.learning_rate": 0,
    "optim.embedding_learning_rate": 0,
    "optim.projector_learning_rate": 0,
    "optim.vision_learning_rate": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.warmup_steps": 0,
    "optim.max_grad_norm": 0,
    "optim.cycles": 1,
  }
  check_choices(config, choices)
  check_at_least(config, at_least)
  check_seed(config)
  writers.names(config.log)
  for key in ("optim.b1", "optim.b2", "lora.dropout"):
    if not 0 <= value(config, key) < 1:
      raise InputError(f"config.{key} is {value(config, key)}; it must be from 0 to below 1")
  if not 0 <= config.optim.warmup_ratio <= 1:
    raise InputError(
      f"config.optim.warmup_ratio is {config.optim.warmup_ratio}; give a share from 0 to 1, or "
      "config.optim.warmup_steps"
    )
  if config.max_steps == 0:
    raise InputError("config.max_steps is 0; give 1 or more, or -1 to go by num_train_epochs")
  if config.max_steps < 0 and config.num_train_epochs <= 0:
    raise InputError("config.num_train_epochs must be above 0, or config.max_steps given")
  if not config.data.train:
    raise InputError("config.data.train is empty; name a data file, see docs/data.md")
  if config.data.eval_samples and not config.data.eval:
    raise InputError("config.data.eval_samples is given, and config.data.eval is empty; name files")
  if config.save_best_limit and not (config.data.eval or config.data.eval_fraction):
    raise InputError(
      f"config.save_best_limit is {config.save_best_limit}, and nothing is evaluated; "
      "give config.data.eval or config.data.eval_fraction"
    )
  if config.save_best_limit and not config.eval_every:
    raise InputError(
      f"config.save_best_limit is {config.save_best_limit}, and config.eval_every is 0: "
      "only the end is evaluated; set it"
    )
  adapters = config.lora.rank or config.lora.vision_rank
  _check_lora(config.lora, adapters)


def _check_lora(lora: Config, adapters: int) -> None:
  try:
    re.compile(lora.targets)
  except re.error as error:
    raise InputError(
      f"config.lora.targets is {lora.targets!r}, no regular expression: {error}"
    ) from error
  if lora.alpha <= 0:
    raise InputError(f"config.lora.alpha is {lora.alpha}; it must be above 0")
  if lora.init_from and not adapters:
    raise InputError(
      "config.lora.init_from is given, and config.lora.rank is 0; set it to the adapters' rank"
    )
