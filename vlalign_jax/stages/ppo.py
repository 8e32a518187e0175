"""Proximal policy optimization: its keys with their defaults, their checks, and its record."""

from ml_collections import ConfigDict, config_dict

from vlalign_jax.config_checks import Config, check_at_least, check_choices
from vlalign_jax.errors import InputError
from vlalign_jax.generation import layout
from vlalign_jax.input_pipeline.prompts import TASK
from vlalign_jax.losses import advantages, kl
from vlalign_jax.losses import ppo as losses
from vlalign_jax.models.stored import CACHE_DTYPES, MODEL
from vlalign_jax.planning import ppo as planning
from vlalign_jax.stage import Stage

CRITIC_STARTS = ("reward", "actor")


def add_keys(c: Config) -> None:
  """Adds the keys of PPO, whose steps are rollouts: batch_size counts prompts.

  Defaults are those of TRL's PPOConfig where nothing else is said; "original" is
  Vision-LLM-Alignment.
  """
  c.log_every = 1
  c.data.pack = False  # each prompt has a row, followed by its answers
  c.metric_for_best_model = "eval/objective/scores"
  c.optim.schedule = "constant_with_warmup"  # TRL: linear; original: cosine
  ppo: Config = ConfigDict()
  c.ppo = ppo
  # --- Scores. Answers are scored by a reward model, a function, or the weighted sum of both.
  ppo.reward_model = ""  # run of train_reward.py, or its export
  ppo.reward_weight = 1.0  # weight of the reward model's score
  ppo.reward_function = ""  # module:name, called with prompt, answer, reference and record
  ppo.function_weight = 1.0  # weight of the function's score
  ppo.score_clip = 10.0  # largest absolute score; 0: no limit (TRL: none; original: 10)
  # Subtracted from the score of an answer without an end token, before clipping (TRL: none).
  ppo.missing_eos_penalty = 0.0
  # Number of last scores whose mean and deviation normalize new scores; 0: no normalization
  # (original: 1000).
  ppo.score_queue = 0
  ppo.score_scale = 10.0  # standard deviation of normalized scores (original: 10)
  ppo.blank_images = False  # reward model and critic see gray pictures: a baseline
  # --- Sampling. The policy that learns, and is compared with the reference, is the model at
  # ppo.temperature (as in TRL) over the tokens that it may choose: never an image token, and no end
  # token before ppo.min_new_tokens. Tokens that ppo.top_k and ppo.top_p cut off count as if they
  # could have been sampled (as in TRL and the original); policy/cut_probability reports how much
  # probability they have.
  ppo.num_generations = 1  # answers to each prompt; rloo and grpo need at least two
  ppo.max_new_tokens = 384  # longest answer in tokens (TRL: 53; original: 384)
  ppo.min_new_tokens = 0  # tokens before which no answer may end
  ppo.temperature = 1.0  # temperature of the policy (TRL: 0.7; original: 0.75)
  ppo.top_k = 0  # sample among this many likeliest tokens; 0: all (original: 50)
  ppo.top_p = 1.0  # sample among the likeliest tokens of this probability (original: 0.95)
  # The devices as answers are sampled on them: auto (the fastest layout that fits), sizes such as
  # tensor=4 or data=2,tensor=4 (weights are copied to it for each rollout), or empty: as mesh says.
  ppo.sampling_mesh = "auto"
  ppo.sample_parts = 1  # parts of a rollout that are sampled in turn, each with its own cache
  # Prompts that are answered at a time, all others waiting: when all answers to one have ended, the
  # next takes its place. 0: all of a part, until the longest answer ends.
  ppo.slots = 0
  # dtype of keys and values while answers are sampled: model (that of model.dtype), or int8, which
  # takes half the space of bfloat16 and is a little less exact (see val/sampler_gap).
  ppo.cache_dtype = MODEL
  # --- Learning from a rollout.
  ppo.estimator = "gae"  # estimator of advantages: gae (with a critic), rloo, grpo (without one)
  ppo.num_ppo_epochs = 4  # passes over each rollout (original: 1)
  ppo.num_mini_batches = 2  # updates in each pass (TRL: 1)
  ppo.cliprange = 0.2  # how far the probability ratio may move from 1; 0: no limit
  ppo.cliprange_value = 0.2  # how far a value may move, in units of rewards; 0: no limit
  ppo.loss_level = "token"  # what the policy's loss averages over: token, answer, sequence
  ppo.gamma = 1.0  # discount per token (original: 0.99)
  ppo.lam = 0.95  # lambda of GAE
  # GAE: scale advantages to mean 0 and standard deviation 1 (original: false).
  ppo.whiten_advantages = True
  ppo.scale_by_std = True  # GRPO: divide by the group's standard deviation; false: Dr. GRPO
  ppo.entropy_coef = 0.0  # weight of the entropy bonus
  # Weight of the supervised loss per token of conversations, added to every update of the actor
  # (PPO-ptx); 0: none.
  ppo.sft_weight = 0.0
  ppo.sft_data = ""  # JSON files with these conversations, comma-separated
  ppo.kl_coef = 0.1  # weight of the KL to the reference (TRL: 0.05; original: 0.1)
  ppo.kl_estimator = "k1"  # k1 or k3, for the penalty in rewards; GRPO has k3 in its loss instead
  ppo.kl_target = 0.0  # KL that an adaptive kl_coef aims at; 0: kl_coef is fixed
  ppo.kl_horizon = 10000.0  # number of answers over which an adaptive kl_coef changes
  # End the passes over a rollout when policy/approxkl_avg of one exceeds this; 0: never.
  ppo.stop_kl = 0.0
  # --- The critic.

  # What the critic starts from: reward (the reward model) or actor (the actor, with a new head of
  # zeros).
  ppo.critic_init = "reward"
  # Highest learning rate of the critic; none: optim.learning_rate.
  ppo.critic_learning_rate = config_dict.placeholder(float)
  ppo.critic_warmup = 0  # first steps, in which only the critic learns (original: 30)
  ppo.actor_zero_stage = config_dict.placeholder(int)  # ZeRO stage; none: mesh.zero_stage
  ppo.critic_zero_stage = config_dict.placeholder(int)  # ZeRO stage; none: mesh.zero_stage
  # --- Logged answers.
  ppo.log_samples_every = 10  # steps between rollouts in rollouts.jsonl and .html; 0: none
  ppo.log_samples = 16  # answers of each of these rollouts


def check_keys(config: Config) -> None:
  """Refuses values that no run can have.

  Raises:
    InputError: names the key, its value and what it may be.
  """
  ppo, choices = config.ppo, (None, 0, 1, 2, 3)
  check_choices(
    config,
    {
      "ppo.estimator": advantages.ESTIMATORS,
      "ppo.critic_init": CRITIC_STARTS,
      "ppo.loss_level": losses.LEVELS,
      "ppo.kl_estimator": kl.KINDS,
      "ppo.cache_dtype": CACHE_DTYPES,
      "ppo.actor_zero_stage": choices,
      "ppo.critic_zero_stage": choices,
      "data.pack": (False,),
      "mesh.offload_optimizer": (False,),
      "lora.dropout": (0.0,),  # a ratio compares two passes, which must drop nothing
    },
  )
  ones = ("num_generations", "max_new_tokens", "sample_parts", "num_ppo_epochs", "num_mini_batches")
  zeros = (
    "slots score_clip missing_eos_penalty score_queue min_new_tokens temperature top_k cliprange "
    "cliprange_value entropy_coef sft_weight kl_coef kl_target stop_kl critic_learning_rate "
    "critic_warmup log_samples_every log_samples"
  )
  check_at_least(config, {f"ppo.{key}": 1 for key in ones})
  check_at_least(config, {f"ppo.{key}": 0 for key in zeros.split()})
  for key in ("gamma", "lam", "top_p"):
    if not 0 < ppo[key] <= 1:
      raise InputError(f"config.ppo.{key} is {ppo[key]}; give more than 0 and at most 1")
  for key in ("score_scale", "kl_horizon"):
    if ppo[key] <= 0:
      raise InputError(f"config.ppo.{key} is {ppo[key]}; give more than 0")
  if ppo.min_new_tokens > ppo.max_new_tokens:
    raise InputError(
      f"config.ppo.min_new_tokens is {ppo.min_new_tokens}, above ppo.max_new_tokens, "
      f"{ppo.max_new_tokens}; lower it"
    )
  layout.sizes(ppo.sampling_mesh, "ppo.sampling_mesh")
  if ppo.slots and ppo.sample_parts > 1:
    raise InputError(
      f"config.ppo.slots is {ppo.slots}, and ppo.sample_parts {ppo.sample_parts}; both say how "
      "many prompts are answered at a time: give one of them"
    )
  if ppo.slots > config.batch_size:
    raise InputError(
      f"config.ppo.slots is {ppo.slots}, above batch_size, {config.batch_size}; lower it"
    )
  if not ppo.temperature:
    raise InputError("config.ppo.temperature is 0; give more, or nothing is explored")
  if not (ppo.reward_model or ppo.reward_function):
    raise InputError(
      "nothing scores answers: give config.ppo.reward_model (a run of train_reward.py) or "
      "config.ppo.reward_function (module:name)"
    )
  if ppo.estimator == "gae" and ppo.critic_init == "reward" and not ppo.reward_model:
    raise InputError(
      'config.ppo.critic_init is "reward", and config.ppo.reward_model is empty; set it to "actor"'
    )
  if ppo.estimator != "gae" and ppo.num_generations < 2:
    raise InputError(
      f"config.ppo.num_generations is {ppo.num_generations}; {ppo.estimator} compares answers "
      "to the same prompt and needs at least 2"
    )
  if ppo.estimator != "gae" and ppo.critic_warmup:
    raise InputError(
      f"config.ppo.critic_warmup is {ppo.critic_warmup}, and {ppo.estimator} has no critic; set it "
      "to 0"
    )
  if ppo.kl_target and not ppo.kl_coef:
    raise InputError(
      f"config.ppo.kl_target is {ppo.kl_target}, and ppo.kl_coef 0, which no factor moves; "
      "let it start above 0"
    )
  if bool(ppo.sft_weight) != bool(ppo.sft_data):
    raise InputError(
      f"config.ppo.sft_weight is {ppo.sft_weight}, and config.ppo.sft_data {ppo.sft_data!r}; give "
      "both or neither"
    )
  shares = config.grad_accumulation * ppo.num_mini_batches
  if config.batch_size % shares:
    raise InputError(
      f"config.batch_size is {config.batch_size}; it must be a multiple of ppo.num_mini_batches x "
      f"grad_accumulation = {shares}"
    )
  if shares % ppo.sample_parts:
    raise InputError(
      f"config.ppo.sample_parts is {ppo.sample_parts}; it must divide ppo.num_mini_batches x "
      f"grad_accumulation = {shares}"
    )


def fill_paths(config: Config) -> None:
  """Names a reward model in a config that is only planned, where no function scores."""
  if not config.ppo.reward_function:
    config.ppo.reward_model = config.ppo.reward_model or "unknown yet"


STAGE = Stage(
  name="ppo",
  task=TASK,
  metrics=("eval/objective/scores", "eval/objective/rlhf_reward"),
  add_keys=add_keys,
  check_keys=check_keys,
  plan=planning.plan,
  fill_paths=fill_paths,
  rows_divide_into=lambda config: config.grad_accumulation * config.ppo.num_mini_batches,
)
