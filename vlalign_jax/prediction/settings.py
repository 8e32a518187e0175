"""The config of prediction: all keys with their defaults, and their checks."""

from ml_collections import ConfigDict

from vlalign_jax import config as configs
from vlalign_jax import storage
from vlalign_jax.config_checks import Config
from vlalign_jax.errors import InputError
from vlalign_jax.generation import layout
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models.backends import ATTENTION_NAMES
from vlalign_jax.models.stored import CACHE_DTYPES, MODEL
from vlalign_jax.weights.source import ModelSource
from vlalign_jax.writers import choose as writers

STAGE = "predict"
GENERATE, LOG_PROBABILITIES, REWARD = "generate", "logprobs", "reward"
MODES = (GENERATE, LOG_PROBABILITIES, REWARD)
# Mode -> the field of a line with its result.
KEYS = {LOG_PROBABILITIES: "logprob", REWARD: "reward"}


def defaults() -> Config:
  """Returns all keys of prediction; keys that training also has mean the same."""
  shared = configs.shared()
  c: Config = ConfigDict()
  c.stage = STAGE
  c.mode = GENERATE  # generate, logprobs (of given answers) or reward (scores of given answers)
  c.seed = shared.seed  # seed of sampling
  c.batch_size = 16  # records at a time, over all devices
  c.reward_model = ""  # scores generated answers: a run of train_reward.py, or its export
  c.gallery = 100  # how many records gallery.html shows; 0: no page

  c.model = ConfigDict()
  c.model.init_from = ""  # model that predicts: a LLaVA, run or PEFT directory
  c.model.dtype = shared.model.dtype
  c.model.attention = shared.model.attention

  c.generation = ConfigDict()
  c.generation.max_new_tokens = 256  # longest answer in tokens
  c.generation.num_return_sequences = 1  # answers to each record; best of n with reward_model
  c.generation.temperature = 0.0  # temperature of sampling; 0: always the likeliest token
  c.generation.top_k = 0  # sample among this many likeliest tokens; 0: all
  c.generation.top_p = 1.0  # sample among the likeliest tokens of this probability
  c.generation.repetition_penalty = 1.0  # as in transformers; 1: none
  c.generation.min_new_tokens = 0  # tokens before which no answer may end
  # Tokens or ids that end an answer, comma-separated; empty: those of the template and the model.
  c.generation.stop_tokens = ""
  # The devices as answers are sampled on them: auto (the fastest layout that fits), sizes such as
  # tensor=4 or data=2,tensor=4 (weights are copied over data), or empty: as mesh says.
  c.generation.sampling_mesh = "auto"
  # dtype of keys and values: model (that of model.dtype), or int8, which takes half the space of
  # bfloat16 and is a little less exact.
  c.generation.cache_dtype = MODEL

  c.data = ConfigDict()
  names = ("eval", "eval_samples", "images", "cache", "placeholders", "template", "max_length")
  names += ("max_images", "image_aspect", "blank_images", "pack", "workers", "on_bad_record")
  for name in (*names, "max_bad_records"):
    c.data[name] = shared.data[name]

  c.mesh = ConfigDict()
  for name in ("data", "fsdp", "tensor"):  # parameters are split over fsdp
    c.mesh[name] = shared.mesh[name]

  c.log = ConfigDict()
  # What shows metrics.json and the records of the gallery as well, as in training.
  c.log.writers = ""
  c.log.project = shared.log.project
  c.log.name = shared.log.name
  return c


def check(config: Config) -> None:
  """Checks a config's keys and values, and makes its paths absolute.

  Raises:
    InputError: names the first wrong key and what to do.
  """
  if config is None:
    raise InputError("--config is missing: --config=configs/predict.py")
  if (stage := config.get("stage")) != STAGE:
    raise InputError(f"this is a config of the stage {stage!r}; give --config=configs/predict.py")
  configs.check_keys(config, defaults())
  choices = {
    "mode": MODES,
    "model.dtype": configs.DTYPES,
    "model.attention": ATTENTION_NAMES,
    "generation.cache_dtype": CACHE_DTYPES,
  }
  configs.check_choices(config, choices | configs.DATA_CHOICES)
  at_least = {"batch_size": 1, "gallery": 0, "data.max_length": 2}
  configs.check_at_least(config, at_least | {"data.max_images": 1, "data.workers": 0})
  configs.check_seed(config)
  layout.sizes(config.generation.sampling_mesh, "generation.sampling_mesh")
  writers.names(config.log)
  for key, what in (
    ("model.init_from", "a Hugging Face directory or a run directory"),
    ("data.eval", "data files"),
  ):
    if not configs.value(config, key):
      raise InputError(f"config.{key} is empty; name {what}")
  if config.reward_model and config.mode != GENERATE:
    raise InputError(
      f"config.reward_model scores generated answers, and config.mode is {config.mode!r}; to score "
      'the answers of records, name it in config.model.init_from with config.mode="reward"'
    )
  config.model.init_from = storage.absolute(config.model.init_from)
  if config.reward_model:
    config.reward_model = storage.absolute(config.reward_model)


def sampling(config: Config, model: ModelSource) -> Sampling | None:
  """Returns the Sampling of the config's `generation` group; None if nothing is generated.

  Raises:
    InputError: it makes no sense, or the tokenizer lacks a stop token.
  """
  if config.mode != GENERATE:
    return None
  options = config.generation.to_dict()
  del options["sampling_mesh"]
  names = options.pop("stop_tokens")
  stops = [name.strip() for name in names.split(",")] if names else []
  stop_ids = tuple(_token_id(stop, model.tokenizer) for stop in stops)
  settings = Sampling(stop_tokens=stop_ids, **options)
  samplings.check(settings, model.config.language.vocab_size)
  return settings


def _token_id(stop: str, tokenizer) -> int:
  if stop.isdecimal():
    return int(stop)
  vocabulary = tokenizer.get_vocab()
  if stop not in vocabulary:
    raise InputError(
      f"config.generation.stop_tokens has {stop!r}, which is not a token of the model's tokenizer; "
      "give its tokens or their ids, comma-separated"
    )
  return vocabulary[stop]
