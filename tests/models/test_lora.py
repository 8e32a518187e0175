"""Adapters against the library peft, and against the model without them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests import parity, peft_models, tiny_models
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.losses import sft
from vlalign_jax.models import lora, vlm
from vlalign_jax.weights import source

VARIANTS = {
  "language": (
    {"r": 4, "lora_alpha": 8, "target_modules": peft_models.LANGUAGE},
    {"rank": 4, "alpha": 8.0},
  ),
  "rank-stabilized, all parts, biases, tied embeddings": (
    {
      "r": 4,
      "lora_alpha": 6,
      "use_rslora": True,
      "target_modules": "|".join((peft_models.LANGUAGE, peft_models.VISION, peft_models.PROJECTOR)),
      "rank_pattern": {"vision_tower.*": 2},
    },
    {
      "rank": 4,
      "vision_rank": 2,
      "alpha": 6.0,
      "use_rslora": True,
      "targets": "/layers/|projector",
    },
  ),
  "queries and values of both towers": (
    {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    {"rank": 3, "vision_rank": 3, "alpha": 3.0, "targets": "query|value"},
  ),
}
TEXT = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
  """A torch model with peft's adapters, our model with the same ones, and one example."""
  theirs, ours = VARIANTS[request.param]
  root = tmp_path_factory.mktemp("lora")
  model = tiny_models.make_llava(root / "llava", text=TEXT if "tied" in request.param else {})
  adapted = peft_models.add(model, **theirs)
  adapted.save_pretrained(root / "peft")
  opened, graphdef, params = peft_models.open_model(
    root / "llava", init_from=str(root / "peft"), **ours
  )
  pictures = parity.make_pictures(2, opened.config.vision.image_size)
  example = parity.make_example(opened.config, 24, tuple(pictures))
  batch = parity.make_rows(opened.config, [[example]], pictures, len(example.tokens), 2)
  return types.SimpleNamespace(
    torch=adapted,
    config=opened.config,
    graphdef=graphdef,
    params=params,
    example=example,
    pictures=pictures,
    batch=batch,
  )


def test_logits_equal_peft(pair):
  with torch.no_grad():
    expected = parity.torch_logits(pair.torch, pair.config, pair.example, pair.pictures).numpy()
    with pair.torch.disable_adapter():
      without = parity.torch_logits(pair.torch, pair.config, pair.example, pair.pictures).numpy()
  logits = parity.logits(pair.graphdef, pair.params, pair.batch)[0]
  assert parity.relative_error(logits, expected) < 1e-5
  assert parity.relative_error(without, expected) > 0.1  # adapters matter
  # The reference of DPO and PPO: the same weights in the model that was built without adapters.
  base, _ = vlm.abstract_params(dataclasses.replace(pair.config, lora=None))
  logits = parity.logits(base, lora.base_params(pair.params), pair.batch)[0]
  assert parity.relative_error(logits, without) < 1e-5


def test_gradients_of_adapters_equal_peft(pair):
  trained, frozen = trees.split(pair.params, lora.is_adapter)

  def loss(trained):
    model = nnx.merge(pair.graphdef, trees.merge(trained, frozen))
    total, count = sft.loss(model(pair.batch), model.head_kernel(), pair.batch, chunk=16)
    return total / count

  value, grads = jax.jit(jax.value_and_grad(loss))(trained)
  pair.torch.zero_grad()
  for name, param in pair.torch.named_parameters():
    param.requires_grad = "lora_" in name
  torch_loss, _ = parity.torch_loss(pair.torch, pair.config, [pair.example], pair.pictures)
  torch_loss.backward()
  assert parity.relative_error(value, torch_loss.detach()) < 1e-5
  expected = peft_models.as_params(pair.config, pair.torch, lambda param: param.grad)
  grads = trees.flatten(grads)
  assert grads.keys() == expected.keys()
  for path, grad in grads.items():  # both sides are float32, and adapters are large
    assert parity.relative_error(grad, expected[path]) < 2e-5, path


def test_new_adapters_change_nothing_and_depend_on_the_seed(tmp_path):
  tiny_models.make_llava(tmp_path)
  _, graphdef, plain = parity.open_model(tmp_path)
  opened, adapted, params = peft_models.open_model(tmp_path, rank=4, vision_rank=2)
  base, _ = vlm.abstract_params(dataclasses.replace(opened.config, lora=None))
  assert base == graphdef
  base_params, expected = trees.flatten(lora.base_params(params)), trees.flatten(plain)
  assert base_params.keys() == expected.keys()
  for path, array in base_params.items():
    np.testing.assert_array_equal(array, expected[path])
  example = parity.make_example(opened.config, 20)
  batch = parity.make_rows(opened.config, [[example]], {}, 20, 0)
  np.testing.assert_array_equal(
    parity.logits(adapted, params, batch), parity.logits(graphdef, plain, batch)
  )
  for path, array in trees.flatten(params).items():
    if path.endswith("/lora_a"):  # Kaiming-uniform with a = sqrt(5): up to 1 / sqrt(in)
      bound = array.shape[-2] ** -0.5
      assert 0.9 * bound < np.abs(array).max() <= bound
      assert abs(np.std(array) / bound - 3**-0.5) < 0.1
    elif path.endswith("/lora_b"):
      assert not np.any(array)
  draws = []
  for seed in (0, 0, 1):
    _, drawn = parity.load_all(opened, seed)
    draws.append(drawn["language"]["layers"]["attention"]["query"]["lora_a"])
  np.testing.assert_array_equal(draws[0], draws[1])
  assert np.any(draws[0] != draws[2])
  assert np.any(draws[0][0] != draws[0][1])  # two layers


def test_dropout_drops_inputs_of_adapters_and_keeps_their_mean():
  class Two(nnx.Module):
    def __init__(self):
      zero = nnx.initializers.zeros
      self.layers = nnx.Dict(
        {
          name: nnx.Linear(64, 64, use_bias=False, kernel_init=zero, rngs=nnx.Rngs(0))
          for name in ("first", "second")
        }
      )

  class Model(nnx.Module):
    def __init__(self):
      self.language = Two()

  model = Model()
  lora.attach(model, lora.LoraConfig(64, alpha=64.0, dropout=0.2), nnx.Rngs(0))
  for linear in model.language.layers.values():
    linear.lora_a[...] = linear.lora_b[...] = jnp.eye(64)
  x = jnp.ones((50, 64))

  def outputs(model):
    return [np.asarray(linear(x)) for linear in model.language.layers.values()]

  dropped = outputs(lora.with_dropout(model, jax.random.key(0)))
  for y in dropped:
    assert set(np.unique(y)) == {np.float32(0), np.float32(1.25)}
    assert abs((y == 0).mean() - 0.2) < 0.03
  assert np.any(dropped[0] != dropped[1])  # each has a mask of its own
  again = outputs(lora.with_dropout(model, jax.random.key(0)))
  other = outputs(lora.with_dropout(model, jax.random.key(1)))
  np.testing.assert_array_equal(dropped, again)
  assert np.any(dropped[0] != other[0])
  for y in outputs(model):  # the model itself is unchanged
    np.testing.assert_array_equal(y, x)


@pytest.mark.slow
def test_dropout_depends_on_the_key_of_the_batch(tmp_path):
  tiny_models.make_llava(tmp_path)
  opened, _, params = peft_models.open_model(
    tmp_path, rank=4, vision_rank=2, dropout=0.3, targets="/layers/|projector"
  )
  graphdef, _ = vlm.abstract_params(opened.config, remat="full")
  params = trees.map_paths(
    lambda path, x: jnp.full_like(x, 0.1) if path.endswith("lora_b") else x, params
  )
  pictures = parity.make_pictures(1, opened.config.vision.image_size)
  example = parity.make_example(opened.config, 12, tuple(pictures))
  batch = parity.make_rows(opened.config, [[example]], pictures, len(example.tokens), 1)

  @jax.jit
  def gradient(params, **options):
    return jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(batch | options) ** 2))(
      params
    )

  key = jax.random.key(7)
  (first, grad), (second, _) = (gradient(params, dropout_key=key) for _ in range(2))
  third, _ = gradient(params, dropout_key=jax.random.key(8))
  off, _ = gradient(params)
  assert first == second
  assert len({float(first), float(third), float(off)}) == 3
  # The recomputation in the backward pass uses the masks of the forward pass.
  path = ("language", "layers", "mlp", "up", "lora_b")
  step, leaf = 1e-2, params
  for part in path:
    leaf, grad = leaf[part], grad[part]
  direction = grad / jnp.linalg.norm(grad)
  flat = trees.flatten(params)
  ends = [
    gradient(
      trees.unflatten(flat | {"/".join(path): leaf + sign * step * direction}), dropout_key=key
    )
    for sign in (1, -1)
  ]
  slope = (ends[0][0] - ends[1][0]) / (2 * step)
  assert abs(slope / jnp.linalg.norm(grad) - 1) < 1e-2


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"rank": 4, "targets": "self_attn"}, r"targets, 'self_attn', .*language/layers/attention/out"),
    ({"rank": 4, "targets": "head|embedding"}, "change the pattern, or set lora.rank to 0"),
    ({"vision_rank": 4, "targets": "^language/"}, r"config.lora.vision_rank is 4.*vision/layers"),
  ],
)
def test_targets_that_match_nothing_are_refused(keys, message, tmp_path):
  tiny_models.make_llava(tmp_path)
  with pytest.raises(InputError, match=message):
    source.open_for(peft_models.config_for(tmp_path, **keys))
