"""Parts of our models that transformers lacks, in torch."""

import torch
import transformers
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


class LinearProjector(torch.nn.Module):
  """The `linear` projector."""

  def __init__(self, vision_config, in_width: int, out_width: int):
    super().__init__()
    self.linear = torch.nn.Linear(in_width, out_width)
    self.norm = torch.nn.LayerNorm(out_width, eps=1e-12)

  def forward(self, features):
    return self.norm(self.linear(features))


class VitProjector(LinearProjector):
  """The `vit` projector: a layer of CLIP before that."""

  def __init__(self, vision_config, in_width: int, out_width: int):
    super().__init__(vision_config, in_width, out_width)
    self.block = CLIPEncoderLayer(vision_config)

  def forward(self, features):
    return super().forward(self.block(features, attention_mask=None))


PROJECTORS = {"linear": LinearProjector, "vit": VitProjector}


def use_mmca(model: transformers.LlavaForConditionalGeneration) -> None:
  """Gives the language model multi-modal causal attention, as defined; one example a call."""
  images = None

  def look(module, args, kwargs):
    nonlocal images
    images = kwargs["input_ids"][0] == module.config.image_token_id

  def attend(module, query, key, value, attention_mask, scaling, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    causal = torch.ones(scores.shape[-2:]).tril().bool()
    alone = torch.eye(len(images)).bool() | ~images[:, None]  # an image's token sees no other
    mixed = 0
    for seen in (causal & ~images, causal & images & alone):
      weights = torch.where(seen, scores, -torch.inf)
      weights = torch.where(seen.any(-1, keepdim=True), weights, 0).softmax(-1)
      mixed = mixed + torch.where(seen, weights, 0) @ value
    return mixed.transpose(1, 2), None

  transformers.AttentionInterface.register("mmca", attend)
  model.register_forward_pre_hook(look, with_kwargs=True)
  model.model.language_model.config._attn_implementation = "mmca"
