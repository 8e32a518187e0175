"""The configuration that every stage shares: its keys with their defaults, and their checks."""

import difflib
import math
import re

from ml_collections import ConfigDict, config_dict

from vlalign_jax.config_checks import check_at_least, check_choices, check_seed, value
from vlalign_jax.errors import InputError
from vlalign_jax.models.backends import ATTENTION_NAMES
from vlalign_jax.models.stack import REMAT_NAMES

DTYPES = ("float32", "bfloat16", "float16")
# Sums of small updates need more than float16 has.
PARAM_DTYPES = ("float32", "bfloat16")
SCHEDULES = (
  "linear",
  "cosine",
  "cosine_with_restarts",
  "polynomial",
  "constant",
  "constant_with_warmup",
)


def shared() -> ConfigDict:
  """Defaults of the keys that all training stages have."""
  c = ConfigDict()
  c.seed = 1234
  # A value of 0 turns its key off wherever 0 makes no sense by itself.
  c.max_steps = -1  # optimizer updates; -1: as many as num_train_epochs take
  c.num_train_epochs = 1.0
  c.batch_size = 128  # examples per update, over all devices and micro-batches
  # Micro-batches that batch_size is split into; an update stays the same (in transformers it
  # multiplies the batch size).
  c.grad_accumulation = 1
  c.log_every = 10
  c.eval_every = 0  # 0: at the end only
  c.save_every = 500  # 0: at the end only
  c.save_total_limit = 2  # newest checkpoints that are kept
  c.save_best_limit = 0  # best checkpoints that are kept besides; each evaluation is then saved
  c.metric_for_best_model = "eval/loss"  # what makes the best

  c.model = ConfigDict()
  c.model.init_from = ""  # a LLaVA directory or a run directory; or else both of:
  c.model.vision = ""  # a CLIP directory
  c.model.language = ""  # a LLaMA directory
  # Published sizes that scripts/plan.py goes by while no weights are named; training never does.
  c.model.architecture = ""  # see weights/published.py
  # Only for a model made of two towers; a LLaVA directory brings its own.
  c.model.projector = "mlp"  # linear, mlp, vit, perceiver
  c.model.vision_feature_layer = "-2"  # several: comma-separated
  c.model.vision_feature_select_strategy = "default"  # default: without the class token; full
  # Of activations and matrix products: float32, bfloat16; float16, with a loss that is scaled
  # dynamically, on hardware without bfloat16.
  c.model.mmca = False  # multi-modal causal attention; a model that has it keeps it
  c.model.dtype = "bfloat16"
  c.model.param_dtype = "float32"  # of trained parameters; frozen ones are kept in model.dtype
  c.model.remat = "full"  # none, full, save_matmuls, save_weight_matmuls
  # The kernel of attention in tower and language model: auto (the fastest that can), tiles (plain
  # JAX), cudnn (NVIDIA GPUs), splash (TPUs).
  c.model.attention = "auto"

  c.train = ConfigDict()
  c.train.vision = False
  c.train.projector = True
  c.train.language = True
  c.train.embeddings = config_dict.placeholder(bool)  # token embedding; None: as language

  # Adapters in place of the weights of the parts that are updated; see models/lora.py.
  c.lora = ConfigDict()
  c.lora.rank = 0  # of adapters on the language model's layers and the projector; 0: none
  c.lora.vision_rank = 0  # of adapters on the vision tower's layers; 0: none
  c.lora.alpha = 16.0  # adapters count alpha / rank
  c.lora.dropout = 0.0
  c.lora.use_rslora = False  # alpha / sqrt(rank) instead
  # Regular expression that is searched in the paths of linear maps, such as
  # language/layers/attention/query, vision/layers/mlp/up, projector/first.
  c.lora.targets = "/layers/"
  c.lora.init_from = ""  # a PEFT directory or a LoRA run that the adapters start from

  c.data = ConfigDict()
  c.data.train = ""  # LLaVA JSON or JSONL; several: comma-separated
  c.data.samples = ""  # records taken from each file (one number, or one per file); empty: all
  c.data.repeats = ""  # times an epoch shows each file; empty: once
  c.data.concatenate = 1  # sft: records of a file that are joined into one conversation
  c.data.eval = ""  # LLaVA files again
  c.data.eval_samples = ""  # as data.samples
  c.data.eval_fraction = 0.0  # held out from data.train when data.eval is empty
  c.data.images = ""  # image root; empty: the JSON file's directory
  c.data.template = "vicuna"
  c.data.max_length = 2048  # tokens of a row
  c.data.max_candidates = 8  # ranked answers of a record, at most
  # Images of a row; None: as many as the rows need.
  c.data.max_images = config_dict.placeholder(int)
  c.data.image_aspect = "auto"  # crop, pad (to a square), auto: as the image processor says
  c.data.blank_images = False  # grey pictures: the baseline of a model that cannot see
  c.data.shuffle = True
  c.data.pack = True
  c.data.workers = 0  # processes that decode ahead; 0: threads of this process
  c.data.on_bad_record = "error"  # error, skip

  c.optim = ConfigDict()
  c.optim.learning_rate = 2e-5
  c.optim.embedding_learning_rate = config_dict.placeholder(float)  # None: learning_rate
  c.optim.projector_learning_rate = config_dict.placeholder(float)  # None: learning_rate
  c.optim.weight_decay = 0.0  # of matrices; norms and biases never decay
  c.optim.b1 = 0.9
  c.optim.b2 = 0.95
  c.optim.eps = 1e-8
  c.optim.warmup_ratio = 0.03  # share of all steps in which the learning rate rises from 0
  c.optim.warmup_steps = 0  # steps of the same; above 0 it counts instead of warmup_ratio
  c.optim.schedule = "cosine"
  c.optim.cycles = 1  # of cosine_with_restarts
  c.optim.power = 1.0  # of polynomial
  c.optim.max_grad_norm = 1.0  # global norm; 0: off

  c.mesh = ConfigDict()
  c.mesh.zero_stage = 0
  c.mesh.data = -1  # -1: what the other axes leave
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.mesh.offload_optimizer = False  # keep the optimizer's state in the hosts' memory
  return c


def check_keys(config: ConfigDict, known: ConfigDict, prefix: str = "config") -> None:
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
  """The message for a key that no config has, with the nearest one that exists."""
  last = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
  near = difflib.get_close_matches(name, known, 1, 0.8)
  near = near or [last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)]
  near = near or difflib.get_close_matches(name, known, 1, 0.0)
  return f"unknown key {name}; did you mean {near[0]}?"


def _check_type(name: str, given, kind: type, default) -> None:
  if given is None and default is None:  # a placeholder, which stays empty
    return
  # type() and not isinstance(): True is no number here.
  if type(given) is not kind and (kind, type(given)) != (float, int):
    raise InputError(f"{name} is {given!r}; it must be of type {kind.__name__}")
  if kind is float and not math.isfinite(given):
    raise InputError(f"{name} is {given}; give a finite number")


def check_shared(config: ConfigDict, metrics: tuple[str, ...]) -> None:
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
    "data.on_bad_record": ("error", "skip"),
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
    "lora.rank": 0,
    "lora.vision_rank": 0,
    "optim.learning_rate": 0,
    "optim.embedding_learning_rate": 0,
    "optim.projector_learning_rate": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.warmup_steps": 0,
    "optim.max_grad_norm": 0,
    "optim.cycles": 1,
  }
  check_choices(config, choices)
  check_at_least(config, at_least)
  check_seed(config)
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
    raise InputError("config.data.train is empty; name a LLaVA-format JSON file")
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


def _check_lora(lora: ConfigDict, adapters: int) -> None:
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
