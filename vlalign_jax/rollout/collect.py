"""A rollout: answers that the actor samples, their scores, and the reference's probabilities."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from vlalign_jax import out_of_memory, trees
from vlalign_jax.config_checks import Config
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError
from vlalign_jax.losses import kl
from vlalign_jax.rollout import reward_function
from vlalign_jax.rollout.function_scores import FunctionScores
from vlalign_jax.rollout.reward_text import TextReader
from vlalign_jax.sharding import hosts
from vlalign_jax.steps import answer_rows as layout
from vlalign_jax.steps.ppo import PPOState
from vlalign_jax.steps.ppo_program import PPOProgram
from vlalign_jax.steps.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Roles:
  """The models of a run apart from what is trained, and how answers are scored.

  Attributes:
    program: of the run.
    sampler: of answers.
    frozen: the actor's parameters that are not trained.
    reference: the initial values of those that are.
    critic_frozen: the critic's frozen parameters; None: there is no critic.
    reward: the reward model's parameters; None: there is no reward model.
    reader: makes text for the reward model; None: it reads the rollout's tokens as they are.
    function: of `find_function`.
    tokenizer: the actor's.
    config: of the run.
    mesh: over which batches are split.
    shares_features: whether the actor's tower is frozen, so that a rollout's pictures go through it
      once, and not again in updates.
    same_tower_critic, same_tower_reward: whether these two have the actor's tower.
  """

  program: PPOProgram
  sampler: Sampler
  frozen: dict
  reference: dict | None
  critic_frozen: dict | None
  reward: dict | None
  reader: TextReader | None
  function: Callable | None
  tokenizer: Any
  config: Config
  mesh: jax.sharding.Mesh
  shares_features: bool
  same_tower_critic: bool = False
  same_tower_reward: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
  """Answers to B prompts of all hosts: N to each, of up to M tokens.

  Attributes:
    batch: see `steps.answer_rows`, maybe with `vision_features`; on the devices.
    shape: (N, M).
    log_probabilities, reference: float32[B, N, M], on the devices, by the policy and by the
      reference, both at the temperature and over the tokens that may be chosen.
    drawn: float32[B, N, M], on the devices, by the distribution that top_k and top_p leave.
    lengths: int32[B, N]; ended: bool[B, N]; these and the following are the same on every host.
    scores: float32[B, N], without meaning where lengths is 0.
    tokens: int32[B, N, M].
  """

  batch: dict
  shape: tuple[int, int]
  log_probabilities: jax.Array
  reference: jax.Array
  drawn: jax.Array
  lengths: np.ndarray
  ended: np.ndarray
  scores: np.ndarray
  tokens: np.ndarray

  @property
  def valid(self) -> np.ndarray:
    """bool[B, N], true for answers with a finite score."""
    return (self.lengths > 0) & np.isfinite(self.scores)

  def texts(self, tokenizer) -> list[list[str]]:
    """Returns the answers as text, without special tokens."""
    return decode(tokenizer, self.tokens, self.lengths)


def decode(tokenizer, tokens: np.ndarray, lengths: np.ndarray) -> list[list[str]]:
  """Decodes answers int32[B, N, M] with lengths int[B, N] to text, as prediction does."""
  return [
    [
      tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
      for ids, length in zip(of_prompt, sizes, strict=True)
    ]
    for of_prompt, sizes in zip(tokens, lengths, strict=True)
  ]


@out_of_memory.names(out_of_memory.SAMPLING)
def collect(
  roles: Roles,
  state: PPOState,
  prompts: dict,
  records: Sequence[Record | None],
  streams: np.ndarray,
  seed: int,
) -> Rollout:
  """Makes a rollout.

  Args:
    roles: of the run.
    state: with the actor's parameters.
    prompts: a batch with one prompt a row.
    records: of each row of all hosts; None for rows of padding.
    streams: int32[B], of all hosts, which choose the random numbers of each row.
    seed: of all random numbers.

  Raises:
    InputError: the reward function fails, no answer has a finite score, or the devices say that
      keys and values do not fit.
  """
  program, settings = roles.program, roles.config.ppo
  actor = trees.merge(state.params, roles.frozen)
  seen = prompts
  if prompts["images"].shape[1]:
    seen = prompts | {"vision_features": program.vision_features(actor, prompts, None)}
  on_devices = hosts.whole_to_device(roles.mesh, {"streams": streams.astype(np.int32)})
  roles.sampler.check_memory(*prompts["tokens"].shape)
  # The sampler's own weights are let go when the answers are there.
  params = roles.sampler.place(actor)
  by_function, given = None, (params, for_sampling(seen), on_devices["streams"], seed)
  if roles.function is not None:
    by_function = FunctionScores(
      roles.function,
      functools.partial(decode, roles.tokenizer),
      records,
      settings.num_generations,
      hosts.rows_owned(roles.mesh, len(records)),
    )
  generated = roles.sampler.sample(*given, by_function and by_function.add)
  del params, given
  if roles.shares_features:
    prompts = seen
  del seen
  tokens, lengths, ended = hosts.fetch((generated.tokens, generated.lengths, generated.ended))
  shape = tokens.shape[1], layout.answer_length(int(lengths.max()), settings.max_new_tokens)
  tokens = tokens[:, :, : shape[1]]
  logps = generated.log_probabilities[:, :, : shape[1]]
  batch = program.answer_rows(prompts, generated.tokens[:, :, : shape[1]], generated.lengths)
  scores = _scores(roles, batch, shape, tokens, lengths, records, by_function)
  with out_of_memory.explained(out_of_memory.REFERENCE, roles.config):
    reference = program.reference((roles.reference, roles.frozen), batch, shape)
  return Rollout(
    batch=batch,
    shape=shape,
    log_probabilities=logps,
    reference=reference,
    drawn=generated.drawn_log_probabilities[:, :, : shape[1]],
    lengths=lengths,
    ended=ended,
    scores=scores,
    tokens=tokens,
  )


def for_sampling(prompts: dict) -> dict:
  """Returns the fields of a batch of prompts that the sampler takes."""
  names = ("tokens", "positions", "segments", "image_slots", "images", "vision_features")
  return {name: prompts[name] for name in names if name in prompts}


@out_of_memory.names(out_of_memory.SCORING)
def _scores(
  roles: Roles, batch, shape, tokens, lengths, records, by_function: FunctionScores | None
) -> np.ndarray:
  """Returns float32[B, N], the weighted sum of the reward model's and the function's scores."""
  settings, model_scores = roles.config.ppo, None
  has_answer = lengths > 0
  total = np.zeros(lengths.shape, np.float64)
  if roles.reward is not None:  # the devices compute while the function runs
    if roles.reader is None:
      row_length = batch["tokens"].shape[1]
      places = layout.last_places(lengths, row_length, shape[1])
      seen = {"same_tower": roles.same_tower_reward, "blank": settings.blank_images}
      places = hosts.whole_to_device(roles.mesh, {"answers": np.asarray(places, np.int32)})
      batch = layout.batch_for_scorer(batch, **seen) | places
    else:
      here = hosts.rows_here(roles.mesh, len(records))
      texts = decode(roles.tokenizer, tokens, lengths)
      answered = [records[row] if has_answer[row].any() else None for row in here]
      batch = hosts.to_device(roles.mesh, roles.reader.rows(answered, [texts[row] for row in here]))
    model_scores = roles.program.scores(roles.reward, batch, None)
  if by_function is not None:
    by_function.add(np.arange(len(records)), tokens, lengths)  # those that came last
    total += settings.function_weight * by_function.joined()
  if model_scores is not None:
    total += settings.reward_weight * hosts.fetch(model_scores).astype(np.float64)
  _check_finite(total[has_answer])
  return total.astype(np.float32)


def _check_finite(scores: np.ndarray) -> None:
  bad = int(np.sum(~np.isfinite(scores)))
  if bad and bad == len(scores):
    raise InputError(
      f"none of the {bad} answers of a rollout has a finite score; fix what scores them "
      "(ppo.reward_model, ppo.reward_function)"
    )
  if bad:
    logging.warning("%d of %d answers are left out: their scores are not finite", bad, len(scores))


def find_function(config) -> Callable | None:
  """Returns `(record, answer) -> float` from the config's ppo.reward_function, or None."""
  name = config.ppo.reward_function
  if not name:
    return None
  function = reward_function.find(name)
  return lambda record, answer: reward_function.score(function, name, record, answer)


def divergence(rollout: Rollout, kind: str = "k1") -> np.ndarray:
  """Returns float64[B, N], `losses.kl.estimate` summed over the tokens of each answer."""
  logps, reference = hosts.fetch((rollout.log_probabilities, rollout.reference))
  mask = np.arange(logps.shape[-1]) < rollout.lengths[..., None]
  per_token = np.asarray(kl.estimate(logps, reference, kind))
  return np.asarray(np.sum(np.where(mask, per_token, 0.0), axis=-1, dtype=np.float64))
