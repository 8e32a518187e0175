"""Tests new models of a vision tower, a language model and a fresh projector."""

import json
import types

import jax
import numpy as np
import pytest
import torch

from tests import parity, tiny_models
from tests.weights.round_trip import (
  assert_same_bits,
  example_of,
  load_in_torch,
  our_logits,
  torch_logits,
)
from vlalign_jax.weights import export, source


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
  """Directories of a full CLIP, its vision tower alone, and a LLaMA; the torch models."""
  root = tmp_path_factory.mktemp("towers")
  clip = tiny_models.make_clip(root / "clip", whole=True)
  alone = tiny_models.make_clip(root / "vision", whole=False, seed=9)
  alone.load_state_dict(clip.vision_model.state_dict())
  alone.save_pretrained(root / "vision")
  llama = tiny_models.make_llama(root / "llama")
  return types.SimpleNamespace(
    clip=str(root / "clip"),
    vision=str(root / "vision"),
    language=str(root / "llama"),
    torch_vision=alone,
    torch_language=llama,
  )


def assemble(towers, **keys):
  """Returns (source, graphdef, params) of a new model of a vision and a language directory."""
  opened = source.open_source(
    parity.model_group(**{"vision": towers.clip, "language": towers.language, **keys})
  )
  return opened, *parity.load_all(opened, seed=3)


def test_a_linear_projector_between_two_towers(towers, tmp_path):
  opened, graphdef, params = assemble(towers, projector="linear")
  config, tokenizer = opened.config, opened.tokenizer
  assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 502
  assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<pad>") == 503
  assert config.language.vocab_size == 512

  llama = towers.torch_language
  for ours, theirs in (
    (params["language"]["embedding"]["embedding"], llama.model.embed_tokens.weight),
    (params["language"]["head"]["kernel"].T, llama.lm_head.weight),
  ):
    theirs = theirs.detach().numpy()
    np.testing.assert_array_equal(ours[:502], theirs)
    mean = theirs.mean(0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(ours[502:], np.broadcast_to(mean, (10, 32)))

  # The same computation in torch, with our fresh projector. Its outputs are made small, so that the
  # epsilon of the norm matters.
  params["projector"]["linear"] = jax.tree.map(lambda x: x * 1e-3, params["projector"]["linear"])
  projector = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params["projector"])
  norm = projector["norm"]
  example, pictures = example_of(config)
  with torch.no_grad():
    pixels = parity.pixel_values(config, [pictures[path] for path in example.images])
    features = towers.torch_vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = features @ projector["linear"]["kernel"] + projector["linear"]["bias"]
    projected = torch.nn.functional.layer_norm(
      projected, (32,), norm["scale"], norm["bias"], eps=1e-12
    )
    tokens = torch.tensor(example.tokens)
    is_image = tokens == config.image_token_id
    embedded = llama.model.embed_tokens(torch.where(is_image, 0, tokens))
    embedded[is_image] = projected.reshape(-1, 32)
    expected = llama(inputs_embeds=embedded[None]).logits[0]
  logits = our_logits(config, graphdef, params)
  assert parity.relative_error(logits[:, :502], expected) < 1e-5

  out = str(tmp_path / "out")
  export.export_model(opened, params, out)
  imported, _, imported_params = parity.open_model(out)
  assert (imported.config, imported.fresh) == (config, ())
  assert_same_bits(imported_params, params)
  stored = json.loads((tmp_path / "out" / "config.json").read_text())
  assert stored["architectures"] == ["VlalignForConditionalGeneration"]
  assert stored["projector_type"] == "linear"


def test_an_mlp_projector_between_two_towers_is_a_llava(towers, tmp_path):
  opened, graphdef, params = assemble(towers, vision=towers.vision, vision_feature_layer="-3,-1")
  out = str(tmp_path / "out")
  export.export_model(opened, params, out)
  logits = our_logits(opened.config, graphdef, params)
  expected = torch_logits(load_in_torch(out), opened.config)
  assert parity.relative_error(logits, expected) < 1e-5
  assert_same_bits(parity.open_model(out)[2], params)


def test_a_full_clip_and_its_vision_tower_give_the_same(towers):
  _, _, from_clip = assemble(towers)
  _, _, from_tower = assemble(towers, vision=towers.vision)
  assert_same_bits(from_clip, from_tower)
  jax.tree.map(lambda x: np.testing.assert_equal(np.isfinite(x).all(), True), from_clip)
