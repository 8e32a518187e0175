"""Gradients and optimizer steps of our SFT step against torch's, on the same weights and data."""

import dataclasses
import functools
import math
import re
import types

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tests import parity, tiny_models, torch_parts
from vlalign_jax import stages, trees
from vlalign_jax.data import plan
from vlalign_jax.models import tiles, vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.optim import state as training_state
from vlalign_jax.stages import defaults
from vlalign_jax.steps import accumulate, sft, update
from vlalign_jax.weights import names

OPTIM = defaults("sft").optim
OPTIM.update(learning_rate=3e-3, weight_decay=0.1, warmup_steps=4)
STEPS = 20
CHUNK = 16


def make_model(directory, projector: str = "mlp", mmca: bool = False, **overrides):
  """The torch model, ours with its weights, and six examples with their pictures."""
  torch_model = tiny_models.make_llava(directory, **overrides)
  source, graphdef, params = parity.open_model(directory)
  config = source.config
  if projector != "mlp":
    config = dataclasses.replace(
      config, projector=dataclasses.replace(config.projector, kind=projector), mmca=mmca
    )
    widths = config.projector.in_width, config.projector.out_width
    ours = torch_parts.PROJECTORS[projector](torch_model.config.vision_config, *widths)
    tiny_models.randomise(ours, seed=4)
    torch_model.model.multi_modal_projector = ours
    graphdef, _ = vlm.abstract_params(config)
    params = trees.unflatten(parity.as_params(config, torch_model.state_dict()))
  if mmca:
    torch_parts.use_mmca(torch_model)
  pictures = parity.make_pictures(4, config.vision.image_size)
  shown = [(), ("0.png",), ("1.png", "2.png", "0.png"), ("3.png",), (), ("2.png", "2.png")]
  lengths = [33, 14, 21, 5, 9, 17]
  examples = [
    parity.make_example(config, length, images, seed)
    for seed, (length, images) in enumerate(zip(lengths, shown, strict=True))
  ]
  return types.SimpleNamespace(
    torch=torch_model,
    source=source,
    config=config,
    graphdef=graphdef,
    params=params,
    pictures=pictures,
    examples=examples,
  )


def gradients_in_torch(model):
  """(loss, path -> gradient) of the mean over the learned tokens of all examples."""
  model.torch.zero_grad()
  loss, _ = parity.torch_loss(model.torch, model.config, model.examples, model.pictures)
  loss.backward()
  tensors = {name: param.grad for name, param in model.torch.named_parameters()}
  # Features may come from a layer before the last, and LLaVA never applies what is behind it.
  layers = model.torch.config.vision_config.num_hidden_layers
  behind = [f"layers.{layer}." for layer in range(model.config.vision.layers, layers)]
  behind += ["post_layernorm", "vision_tower.head."]
  unused = [name for name, grad in tensors.items() if grad is None]
  assert all(any(part in name for part in behind) for name in unused)
  return float(loss.detach()), parity.as_params(model.config, tensors)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_model(
    tmp_path_factory.mktemp("llava"),
    text={"attention_bias": True, "mlp_bias": True},
    vision_feature_layer=[-2, -1],
  )


@pytest.fixture(scope="module")
def torch_gradients(model):
  return gradients_in_torch(model)


def planned_rows(model, *, pack: bool, row_multiple: int = 1):
  """The batch of all examples that `plan` makes."""
  order = np.arange(len(model.examples))
  lengths = np.array([len(example.tokens) for example in model.examples])
  planned = plan.plan_batches(
    order,
    lengths,
    plan.ImageSets.from_paths(example.images for example in model.examples),
    batch_size=len(order),
    max_length=128,
    row_multiple=row_multiple,
    pack=pack,
  )
  layout = [
    [model.examples[number] for number in planned.rows_of(0, row)] for row in range(planned.rows)
  ]
  return parity.make_rows(
    model.config, layout, model.pictures, int(planned.lengths[0]), planned.images
  )


def gradients(model, rows, *, graphdef=None, trained=lambda path: True, parts=1):
  """(mean loss, path -> gradient of the trained parameters)."""
  params, frozen = trees.split(model.params, trained)

  @jax.jit
  def compute(params, frozen, rows):
    counts = sft.loss_denominators(rows)
    inputs = update.StepInputs(frozen, None, counts, jax.random.key(0))
    loss = sft.make_loss(inputs, graphdef=graphdef or model.graphdef, chunk=CHUNK)
    total, _, grads = accumulate.sum_gradients(loss, params, rows, parts)
    return total / counts["loss"], jax.tree.map(lambda g: g / counts["loss"], grads)

  loss, grads = compute(params, frozen, rows)
  return float(loss), trees.flatten(jax.device_get(grads))


def check(found, expected, tolerance):
  """Loss and every gradient within the tolerance, relative to its own norm."""
  assert found[0] == pytest.approx(expected[0], rel=tolerance)
  for path, gradient in found[1].items():
    if path.endswith("attention/key/bias") and not path.startswith("language/"):
      # Softmax does not see what a key's bias adds to all scores of a query: both are rounding.
      query_bias = np.linalg.norm(expected[1][path.replace("key", "query")])
      assert max(np.linalg.norm(gradient), np.linalg.norm(expected[1][path])) < 1e-5 * query_bias
      continue
    assert np.linalg.norm(gradient) > 1e-3, path
    assert parity.relative_error(gradient, expected[1][path]) < tolerance, path


@pytest.fixture(scope="module")
def packed(model):
  return planned_rows(model, pack=True)


@pytest.fixture(scope="module")
def packed_gradients(model, packed):
  return gradients(model, packed)


def test_every_gradient_equals_torch(model, packed, packed_gradients, torch_gradients):
  assert packed["segments"].max() > 1
  assert packed_gradients[1].keys() == {name.path for name in names.names_of(model.config)}
  check(packed_gradients, torch_gradients, 1e-5)


ARCHITECTURES = {
  "tied_embeddings": {
    "text": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "vision_feature_select_strategy": "full",
  },
  "linear_projector": {"projector": "linear", "vision": {"hidden_act": "gelu"}},
  "vit_projector_mmca": {"projector": "vit", "mmca": True},
  "qwen2": {"text": tiny_models.QWEN2_WINDOW},
  "mistral": {"text": tiny_models.MISTRAL_WINDOW},
  "qwen3": {"text": tiny_models.QWEN3_WINDOW},
  "siglip": tiny_models.SIGLIP | {"vision_feature_layer": [-3, -1]},
  "siglip_vit_projector": tiny_models.SIGLIP | {"projector": "vit"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_other_architectures_equal_torch(name, tmp_path):
  model = make_model(tmp_path, **ARCHITECTURES[name])
  found = gradients(model, planned_rows(model, pack=True))
  assert ("language/head/kernel" in found[1]) == (name != "tied_embeddings")
  assert ("projector/norm/scale" in found[1]) == ("_projector" in name)
  check(found, gradients_in_torch(model), 1e-5)


def test_a_frozen_tower_changes_no_other_gradient(model, packed, packed_gradients):
  found = gradients(model, packed, trained=lambda path: not path.startswith("vision/"))
  assert found[1].keys() == {p for p in packed_gradients[1] if not p.startswith("vision/")}
  check(found, packed_gradients, 1e-5)


@pytest.mark.parametrize("remat", ["full", "save_matmuls", "save_weight_matmuls"])
def test_remat_changes_no_gradient(remat, model, packed, packed_gradients):
  graphdef, _ = parity.load_all(model.source, remat=remat)
  check(gradients(model, packed, graphdef=graphdef), packed_gradients, 1e-5)


def test_small_blocks_of_queries_change_no_gradient(model, packed, packed_gradients, monkeypatch):
  monkeypatch.setattr(tiles, "CPU_TILE", 20)
  check(gradients(model, packed), packed_gradients, 1e-5)


def test_unpacked_rows_give_the_same(model, packed_gradients):
  rows = planned_rows(model, pack=False)
  assert rows["segments"].max() == 1
  assert len(rows["tokens"]) == len(model.examples)
  check(gradients(model, rows), packed_gradients, 1e-5)


def test_accumulation_over_uneven_micro_batches_gives_the_same(model, packed_gradients):
  rows = planned_rows(model, pack=True, row_multiple=4)
  learned = rows["loss_mask"].sum(1)
  assert min(learned) == 0  # one micro-batch only pads
  assert len(set(learned)) == 4
  check(gradients(model, rows, parts=4), packed_gradients, 1e-5)


@pytest.fixture(scope="module")
def trainer(model, packed):
  """(initial state, compiled train step) with every parameter trained."""
  params = jax.device_get(model.params)
  tx = optimizer.make_optimizer(OPTIM, params, STEPS)
  step = functools.partial(
    update.train_step,
    make_loss=functools.partial(sft.make_loss, graphdef=model.graphdef, chunk=CHUNK),
    denominators=sft.loss_denominators,
    metrics=stages.sft.metrics,
    optimizer=tx,
    learning_rate=optimizer.learning_rates(OPTIM, STEPS)["base"],
    accumulation=1,
    seed=0,
  )
  state = training_state.init_state(params, tx)
  return state, jax.jit(step).lower(state, {}, packed).compile()


def test_twenty_steps_give_the_losses_of_torch(model, packed, trainer, tmp_path):
  torch_model = tiny_models.make_llava(
    tmp_path, text={"attention_bias": True, "mlp_bias": True}, vision_feature_layer=[-2, -1]
  )
  params = [param for name, param in torch_model.named_parameters() if "post_layernorm" not in name]
  groups = [
    {"params": [param for param in params if param.ndim > 1], "weight_decay": OPTIM.weight_decay},
    {"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0},
  ]
  adam = torch.optim.AdamW(
    groups, lr=OPTIM.learning_rate, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps
  )
  scheduler = transformers.get_scheduler("cosine", adam, OPTIM.warmup_steps, STEPS)
  state, step = trainer
  losses = []
  for number in range(STEPS):
    adam.zero_grad()
    loss, count = parity.torch_loss(torch_model, model.config, model.examples, model.pictures)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, OPTIM.max_grad_norm)
    rate = scheduler.get_last_lr()[0]
    adam.step()
    scheduler.step()
    state, metrics = step(state, {}, packed)
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4), number
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-3), number
    assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5, abs=1e-12), number
    assert float(metrics["learned_tokens"]) == count
    losses.append(float(loss.detach()))
  assert float(norm) > OPTIM.max_grad_norm  # clipping was at work to the end
  assert losses[-1] < 0.6 * losses[0]
  trained = trees.flatten(jax.device_get(state.params))
  for path, expected in parity.as_params(model.config, torch_model.state_dict()).items():
    if path != "vision/layers/attention/key/bias":  # Adam makes whole steps of its rounding
      assert parity.relative_error(trained[path], expected) < 1e-4, path


def test_a_step_that_is_not_finite_is_skipped_and_counted(packed, trainer):
  state, step = trainer
  broken = packed | {"loss_mask": np.where(packed["loss_mask"] > 0, np.inf, 0).astype(np.float32)}
  skipped, metrics = step(state, {}, broken)
  assert not np.isfinite(metrics["loss"])
  assert (int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)) == (1, 1, 1)
  for old, new in (
    (state.params, skipped.params),
    (state.optimizer, skipped.optimizer),
  ):
    jax.tree.map(np.testing.assert_array_equal, old, new)
  skipped, metrics = step(skipped, {}, broken)
  assert int(metrics["skipped_steps"]) == int(metrics["skipped_in_a_row"]) == 2
  # What follows is as if nothing had been: same update, same learning rate.
  straight, expected = step(state, {}, packed)
  after, metrics = step(skipped, {}, packed)
  assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (3, 2, 0)
  for key in ("loss", "grad_norm", "learning_rate"):
    assert float(metrics[key]) == float(expected[key])
  jax.tree.map(np.testing.assert_array_equal, after.params, straight.params)


def array_sizes(compiled) -> set[int]:
  """Element counts of all arrays in an optimized program."""
  shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]", compiled.as_text())
  return {math.prod(int(n) for n in shape.split(",") if n) for shape in shapes}


def test_no_array_of_the_step_has_rows_times_tokens_times_vocabulary(model, packed, trainer):
  vocabulary = model.config.language.vocab_size
  everything = packed["tokens"].size * vocabulary
  sizes = array_sizes(trainer[1])
  assert CHUNK * vocabulary in sizes  # the logits of a chunk, so the shapes were read
  assert max(sizes) < everything
  whole = jax.jit(lambda params: vlm.logits(nnx.merge(model.graphdef, params), packed))
  assert everything in array_sizes(whole.lower(model.params).compile())  # and would be found
