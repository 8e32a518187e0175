"""Makes a tiny torch model with the modules, names and files of Vision-LLM-Alignment."""

import copy
import json
import os

import torch
import transformers
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from tests import parity, tiny_models
from tests.models import test_projectors as definitions
from vlalign_jax.weights import original

# The tokens that the original adds to a LLaMA tokenizer, in order.
ADDED = ("### Image:", "<image>")


class Adapted(torch.nn.Module):
  """Its LinearLayer_LoRA: x W + (x A) B / r."""

  def __init__(self, linear: torch.nn.Linear, rank: int, generator):
    super().__init__()
    self.weight, self.bias = linear.weight, linear.bias
    self.lora_right_weight = noise((linear.in_features, rank), generator)
    self.lora_left_weight = noise((rank, linear.out_features), generator)
    self.scaling = 1 / rank

  def forward(self, x):
    delta = x @ self.lora_right_weight @ self.lora_left_weight
    return torch.nn.functional.linear(x, self.weight, self.bias) + delta * self.scaling

  def merge(self):
    product = self.lora_left_weight.t() @ self.lora_right_weight.t()
    self.weight.data += self.scaling * product


class Original(torch.nn.Module):
  """vis_encoder, lang_decoder, lang_embed, projection."""

  def __init__(self, vision, language, projection):
    super().__init__()
    self.vis_encoder, self.lang_decoder = vision, language
    self.lang_embed = copy.deepcopy(language.model.embed_tokens)
    self.projection = projection

  def hidden(self, tokens, pixels, image_token_id: int):
    """Returns float[T, D] after the final norm; `<image>` is repeated for an image's tokens."""
    x = self.lang_embed(tokens)
    if pixels is not None:
      features = self.projection(self.vis_encoder(pixels).last_hidden_state).flatten(0, 1)
      x = x.masked_scatter((tokens == image_token_id)[:, None], features)
    return self.lang_decoder.model(inputs_embeds=x[None]).last_hidden_state[0]

  def logits(self, tokens, pixels, image_token_id: int):
    """Returns float[T, V]."""
    return self.lang_decoder.lm_head(self.hidden(tokens, pixels, image_token_id))


class Reward(torch.nn.Module):
  """Its ViRewardModel."""

  def __init__(self, model: Original):
    super().__init__()
    self.rwtranrsformer = model
    self.v_head = torch.nn.Linear(model.lang_embed.weight.shape[1], 1, bias=False)


class Vit(torch.nn.Module):
  """Its VisProjection_vit."""

  def __init__(self, vision, width: int):
    super().__init__()
    self.vis_layer = CLIPEncoderLayer(vision)
    self.projection = linear_and_norm(vision.hidden_size, width)

  def forward(self, x):
    return self.projection(self.vis_layer(x, None))


class Perceiver(torch.nn.Module):
  """Its VisProjection_perceiver."""

  def __init__(self, vision, width: int):
    super().__init__()
    places = torch.tensor(definitions.sines_and_cosines(width)).float()
    self.pos_embed = torch.nn.Parameter(places, requires_grad=False)
    self.query = torch.nn.Parameter(torch.zeros(256, width))
    self.kv_proj = torch.nn.Linear(vision.hidden_size, width)
    self.attn = torch.nn.MultiheadAttention(width, width // 128)
    self.ln_q, self.ln_kv, last = (torch.nn.LayerNorm(width, eps=1e-12) for _ in range(3))
    self.projection = torch.nn.Sequential(last, torch.nn.Linear(width, width))

  def forward(self, x):
    x = self.ln_kv(self.kv_proj(x[:, 1:])).transpose(0, 1)
    places = definitions.resized(self.pos_embed.double().numpy(), round(len(x) ** 0.5))
    query = self.ln_q(self.query)[:, None].repeat(1, x.shape[1], 1) + self.pos_embed[:, None]
    attended = self.attn(query, x + torch.tensor(places).float()[:, None], x)[0]
    return self.projection(attended.transpose(0, 1))


def linear_and_norm(in_width: int, width: int) -> torch.nn.Sequential:
  norm = torch.nn.LayerNorm(width, eps=1e-12)
  return torch.nn.Sequential(torch.nn.Linear(in_width, width), norm)


PROJECTIONS = {
  "linear": lambda vision, width: linear_and_norm(vision.hidden_size, width),
  "vit": Vit,
  "perceiver": Perceiver,
}


def noise(shape, generator, scale: float = 0.3) -> torch.nn.Parameter:
  return torch.nn.Parameter(scale * torch.randn(shape, generator=generator))


def make(root, projector: str = "linear", **text) -> Original:
  """Writes the towers' directories, root/clip and root/llama, and returns a model of them.

  Args:
    root: pathlib.Path.
    projector: one of PROJECTIONS.
    **text: of the language model's config.
  """
  vision = tiny_models.make_clip(root / "clip", whole=False)
  language = tiny_models.make_llama(root / "llama", **text)
  language.resize_token_embeddings(len(tokenizer()))
  projection = PROJECTIONS[projector](vision.config, language.config.hidden_size)
  model = Original(vision, language, projection)
  generator = torch.Generator().manual_seed(3)
  changed = [param for param in projection.parameters() if param.requires_grad]
  for param in (*changed, model.lang_embed.weight, language.lm_head.weight):
    param.data += 0.3 * torch.randn(param.shape, generator=generator)
  return model.eval()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
  """Returns the tokenizer of the LLaMA directory with the tokens that the original adds."""
  result = tiny_models.make_tokenizer(image_token=False)
  result.add_tokens(list(ADDED), special_tokens=True)
  result.add_special_tokens({"pad_token": "<PAD>"})
  return result


def adapt(model: Original, rank: int = 2) -> list[Adapted]:
  """Puts adapters into every linear map of the decoder's layers, in place; returns them."""
  generator, adapters = torch.Generator().manual_seed(4), []
  for layer in model.lang_decoder.model.layers:
    for part in (layer.self_attn, layer.mlp):
      for name, module in list(part.named_children()):
        if isinstance(module, torch.nn.Linear):
          adapters.append(Adapted(module, rank, generator))
          setattr(part, name, adapters[-1])
  return adapters


def save(model: torch.nn.Module, directory, with_tokenizer: bool = True, **changes) -> None:
  """Writes the files that the original writes; `changes` are further tensors."""
  os.makedirs(directory, exist_ok=True)
  state = {  # the spelling of transformers 4, which the original runs on
    name.replace("vis_encoder.", "vis_encoder.vision_model.", 1): tensor
    for name, tensor in model.state_dict().items()
  }
  torch.save(state | changes, os.path.join(directory, original.WEIGHTS))
  if with_tokenizer:
    tokenizer().save_pretrained(directory)


def example_of(config):
  """Returns (example with two images, pictures, tokens for torch, pixels for torch)."""
  pictures = parity.make_pictures(2, config.vision.image_size)
  example = parity.make_example(config, 20, tuple(pictures))
  pixels = parity.pixel_values(config, [pictures[path] for path in example.images])
  return example, pictures, torch.tensor(example.tokens).long(), pixels


def heading_in(directory: str) -> bool:
  """Returns whether the heading is a token in a tokenizer's files."""
  with open(os.path.join(directory, "tokenizer.json"), encoding="utf-8") as file:
    return ADDED[0] in {token["content"] for token in json.load(file)["added_tokens"]}
