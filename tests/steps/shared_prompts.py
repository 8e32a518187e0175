"""Losses of rows with shared prompts beside those of separate rows, on one device and on eight.

python -m tests.steps.shared_prompts MODEL_DIRECTORY

Run as a process of its own by test_preferences. Writes one JSON object: run -> the relative errors
of what the steps of DPO and of the reward model compute, and of every gradient. The separate rows
go through the model as SFT's do, on one device, and their losses are put together here.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import parity
from tests.steps import preference_rows
from vlalign_jax import trees
from vlalign_jax.losses import dpo as dpo_losses
from vlalign_jax.losses import head
from vlalign_jax.losses import reward as reward_losses
from vlalign_jax.models import vlm
from vlalign_jax.sharding import hosts, rules, zero
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults, dpo, reward
from vlalign_jax.steps import accumulate, answers, sft, update
from vlalign_jax.weights import source

# Prompt tokens, tokens of each answer, pictures: two to five answers, with and without pictures.
EXAMPLES = [
  (7, [3, 5], ()),
  (5, [4, 1], ("0.png",)),
  (9, [2, 6, 3], ("1.png", "2.png")),
  (6, [1, 2, 4], ()),
  (4, [5, 3, 2, 6], ("2.png",)),
  (8, [2, 2, 1, 3], ()),
  (5, [3, 1, 4, 2, 5], ("0.png",)),
  (3, [6, 2, 3, 1, 2], ()),
]
# The examples of each row.
LAYOUT = [[0, 1, 4], [6], [2, 3], [5], [7], [], [], []]
# Name -> mesh (data, fsdp, tensor) or None, without one.
RUNS = {"one device": None, "eight devices": (2, 2, 2)}
CHUNK = 16
DPO = {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.1, "sft_weight": 0.3}
REWARD = {"center_rewards_coefficient": 0.1}


def settings(stage: str, **keys):
  """The stage's group of a config."""
  group = defaults(stage)[stage]
  group.update(keys)
  return group


def separate_log_probabilities(graphdef, params, rows, numbers):
  """float32[N, K], from rows of one plain sequence each."""
  model = nnx.merge(graphdef, params)
  tokens = head.token_log_probabilities(
    model(rows | sft.ONE_ANSWER),
    model.head_kernel(),
    rows["targets"],
    rows["loss_mask"],
    chunk=CHUNK,
  )
  return jnp.sum(tokens, axis=1)[numbers]


def separate_scores(graphdef, params, rows, numbers):
  """float32[N, K], at the last token of each row."""
  model = nnx.merge(graphdef, params)
  last = jnp.sum(rows["segments"], axis=1) - 1
  hidden = model(rows | sft.ONE_ANSWER)[jnp.arange(len(last)), last]
  return (hidden @ params["score"]["kernel"])[:, 0][numbers]


def separate_dpo(graphdef, params, initial, rows, numbers):
  """(mean loss, log-probabilities [N, K])."""
  logps = separate_log_probabilities(graphdef, params, rows, numbers)
  base = jax.lax.stop_gradient(separate_log_probabilities(graphdef, initial, rows, numbers))
  lengths = jnp.sum(rows["loss_mask"], axis=1)[numbers]
  options = {("kind" if key == "loss" else key): value for key, value in DPO.items()}
  total, count = dpo_losses.loss(logps, base, lengths, numbers >= 0, **options)
  return total / count, logps


def separate_reward(graphdef, params, rows, numbers):
  """(mean loss, scores [N, K])."""
  scores = separate_scores(graphdef, params, rows, numbers)
  total, count = reward_losses.loss(scores, numbers >= 0, **REWARD)
  return total / count, scores


def by_example(values, numbers):
  """[N, K] of values [B, S, K] of rows, 0 where there is no answer."""
  found = np.zeros(numbers.shape)
  for row, held in enumerate(LAYOUT):
    for segment, example in enumerate(held):
      found[example] = values[row, segment]
  return np.where(numbers >= 0, found, 0)


def step_gradients(stage, values, options, params, initial, rows, mesh, parts):
  """(mean loss, values [B, S, K], gradients) by the stage's own step; `values` makes the second."""

  @jax.jit
  def compute(params, initial, rows):
    counts = stage.loss_denominators(rows)
    inputs = update.StepInputs({}, initial, counts, jax.random.key(0))
    loss = stage.make_loss(inputs, mesh=mesh, chunk=CHUNK, **options)
    total, _, grads = accumulate.sum_gradients(loss, params, rows, parts, mesh)
    # One after the other: see stages/dpo.py.
    params, rows, total, grads = jax.lax.optimization_barrier((params, rows, total, grads))
    found = values(nnx.merge(options["graphdef"], params), rows)
    return total / counts["loss"], found, jax.tree.map(lambda g: g / counts["loss"], grads)

  loss, found, grads = jax.device_get(compute(params, initial, rows))
  return float(loss), found, grads


def gradient_errors(found, expected) -> dict[str, float]:
  """Relative error by path."""
  found, expected = trees.flatten(found), trees.flatten(expected)
  assert found.keys() == expected.keys()
  errors = {}
  for path, gradient in expected.items():
    if path.endswith("attention/key/bias") and not path.startswith("language/"):
      # Adds the same to all scores of a query: rounding, to be small beside the query's.
      scale = np.linalg.norm(expected[path.replace("key", "query")])
      errors[path] = float(np.linalg.norm(found[path]) / scale)
    else:
      assert np.linalg.norm(gradient) > 1e-4, path
      errors[path] = parity.relative_error(found[path], gradient)
  return errors


def run(case, mesh_sizes):
  """Errors on one mesh, at ZeRO stage 3."""
  rows = preference_rows.shared_rows(case.config, case.preferences, LAYOUT, case.pictures)
  mesh, parts, place = None, 1, lambda tree: tree
  if mesh_sizes:
    c = defaults("sft")
    c.mesh.update(dict(zip(meshes.AXES, mesh_sizes, strict=True)))
    mesh = meshes.make_mesh(c.mesh)
    rows = hosts.to_device(mesh, rows)
    parts = len(LAYOUT) // meshes.row_blocks(mesh)

    def place(tree):
      return jax.device_put(tree, zero.shardings(mesh, tree, split=True))

  errors = {}

  def compare(name, expected, *arguments):
    loss, values, grads = step_gradients(*arguments, rows, mesh, parts)
    expected_loss, expected_values, expected_grads = expected
    values = by_example(values, case.numbers)
    errors[f"{name} answers"] = answer_errors(values, expected_values)
    errors[f"{name} loss"] = abs(loss / expected_loss - 1)
    errors[f"{name} gradients"] = gradient_errors(grads, expected_grads)

  policy, _ = vlm.abstract_params(case.config, mesh=mesh)
  log_probabilities = functools.partial(answers.log_probabilities, mesh=mesh, chunk=CHUNK)
  options = {"graphdef": policy, "reference_graphdef": policy, "settings": settings("dpo", **DPO)}
  compare("dpo", case.dpo, dpo, log_probabilities, options, place(case.params), place(case.initial))

  scorer, _ = vlm.abstract_params(dataclasses.replace(case.config, head=vlm.SCORE), mesh=mesh)
  options = {"graphdef": scorer, "settings": settings("reward", **REWARD)}
  compare("reward", case.reward, reward, answers.scores, options, place(case.scorer), None)
  return errors


def answer_errors(found, expected) -> dict[int, float]:
  """Relative error of the values [N, K] of all examples that have so many answers."""
  counts = np.array([len(answer_lengths) for _, answer_lengths, _ in EXAMPLES])
  return {
    int(K): parity.relative_error(found[counts == K], expected[counts == K])
    for K in np.unique(counts)
  }


@dataclasses.dataclass
class Case:
  """The model, the examples, and what separate rows give."""

  config: vlm.ModelConfig
  pictures: dict
  preferences: list
  numbers: np.ndarray
  params: dict
  initial: dict
  scorer: dict
  dpo: tuple
  reward: tuple


def make_case(directory: str) -> Case:
  """Reads the model; the reference differs from it in every parameter."""
  opened = source.open_source(parity.model_group(init_from=directory))
  config = opened.config
  graphdef, params = parity.load_all(opened)
  params = jax.device_get(params)
  rng = np.random.default_rng(0)
  initial = jax.tree.map(
    lambda x: (x + 0.05 * rng.normal(size=x.shape) * x.std()).astype(np.float32), params
  )
  score = rng.normal(size=(config.language.width, 1)).astype(np.float32) / 4
  flat = {path: x for path, x in trees.flatten(params).items() if path != "language/head/kernel"}
  scorer = trees.unflatten(flat | {"score/kernel": score})
  pictures = parity.make_pictures(3, config.vision.image_size)
  made = [
    preference_rows.make_preference(config, prompt, lengths, images, seed)
    for seed, (prompt, lengths, images) in enumerate(EXAMPLES)
  ]
  numbers = preference_rows.answer_numbers(made)
  rows = preference_rows.separate_rows(config, made, pictures)

  def evaluate(function, params, *rest):
    compute = jax.jit(jax.value_and_grad(function, has_aux=True))
    (loss, values), grads = compute(params, *rest)
    values = np.where(numbers >= 0, values, 0)
    return float(loss), values, jax.device_get(grads)

  of_dpo = functools.partial(separate_dpo, graphdef, numbers=numbers)
  score_graphdef, _ = vlm.abstract_params(dataclasses.replace(config, head=vlm.SCORE))
  of_reward = functools.partial(separate_reward, score_graphdef, numbers=numbers)
  return Case(
    config=config,
    pictures=pictures,
    preferences=made,
    numbers=numbers,
    params=params,
    initial=initial,
    scorer=scorer,
    dpo=evaluate(of_dpo, params, initial, rows),
    reward=evaluate(of_reward, scorer, rows),
  )


def main(directory: str) -> None:
  rules.MIN_SIZE = 32  # a tiny model has nothing as large as the true limit
  case = make_case(directory)
  print(json.dumps({name: run(case, sizes) for name, sizes in RUNS.items()}))


if __name__ == "__main__":
  main(sys.argv[1])
