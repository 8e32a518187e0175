"""Tiny random Hugging Face checkpoints, made with transformers' torch classes.

No weight is left at a special value (norms away from 1, biases away from 0), so that a swapped,
missing or transposed one shows in the outputs.
"""

import functools
import json
import os

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.data import tokenizers

IMAGE_SIZE, PATCH_SIZE = 12, 4

# Language models with sliding windows, as `text` of `make_llava`.
MISTRAL_WINDOW = {"model_type": "mistral", "sliding_window": 7}
QWEN2_WINDOW = {
  "model_type": "qwen2",
  "use_sliding_window": True,
  "sliding_window": 7,
  "max_window_layers": 0,
}
QWEN3_WINDOW = QWEN2_WINDOW | {"model_type": "qwen3"}

# A SigLIP tower and all its features, as overrides of `make_llava`.
SIGLIP = {
  "vision": {"model_type": "siglip_vision_model"},
  "vision_feature_select_strategy": "full",
}

# transformers 5 name -> the name that earlier versions wrote.
LAYOUTS = {
  # Up to 4.51, and every LLaVA on the hub.
  "old": (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
  ),
  # From 4.52 on.
  "new": (("model.vision_tower.", "model.vision_tower.vision_model."),),
}


@functools.cache
def _tokenizer_json() -> str:
  return tokenizers.byte_level_tokenizer().backend_tokenizer.to_str()


def make_tokenizer(image_token: bool = True, **more) -> transformers.PreTrainedTokenizerFast:
  """A tokenizer like Llama 3's; `<image>` and `<|pad|>` are its last tokens, or are missing.

  `more` are further arguments of its class.
  """
  content = json.loads(_tokenizer_json())
  options = {"pad_token": "<|pad|>"} if image_token else {}
  if not image_token:
    content["added_tokens"] = [
      token for token in content["added_tokens"] if token["content"] not in ("<image>", "<|pad|>")
    ]
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer.from_str(json.dumps(content)),
    bos_token="<|begin_of_text|>",
    eos_token="<|end_of_text|>",
    clean_up_tokenization_spaces=False,
    **options,
    **more,
  )


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
  """Random weights that keep activations near size 1."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, param in model.named_parameters():
      noise = torch.randn(param.shape, generator=generator)
      if "embed" in name and "patch" not in name:
        param.copy_(noise)
      elif param.ndim > 1:
        param.copy_(noise * param[0].numel() ** -0.5)
      else:
        scale_of_norm = "norm" in name and name.endswith("weight")
        param.copy_(0.3 * noise + (1 if scale_of_norm else 0))


def text_config(tokenizer, model_type: str = "llama", **overrides):
  """Grouped-query attention, and heads that do not add up to the width, unless head_dim is None."""
  values = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "bos_token_id": tokenizer.bos_token_id,
    "eos_token_id": tokenizer.eos_token_id,
    "pad_token_id": tokenizer.pad_token_id,
    **overrides,
  }
  if values["head_dim"] is None:  # Qwen2's config has no such field
    del values["head_dim"]
  return transformers.AutoConfig.for_model(model_type, **values)


def vision_config(model_type: str = "clip_vision_model", **overrides):
  """A tower whose every size differs from the language model's."""
  values = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    **overrides,
  }
  if model_type == "clip_vision_model":
    values = {"projection_dim": 16, **values}
  return transformers.AutoConfig.for_model(model_type, **values)


def save_image_processor(
  directory: str, size: int, *, model_type: str = "clip_vision_model", **options
) -> None:
  """preprocessor_config.json for pictures of `size` x `size`, of the class of the tower."""
  square = {"height": size, "width": size}
  if model_type == "siglip_vision_model":
    processor = SiglipImageProcessorPil(size=square, **options)
  else:
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square, **options)
  processor.save_pretrained(directory)


def make_llava(
  directory: str,
  *,
  text: dict | None = None,
  vision: dict | None = None,
  layout: str = "transformers",
  max_shard_size: str = "5GB",
  seed: int = 0,
  **overrides,
) -> transformers.LlavaForConditionalGeneration:
  """Writes a LLaVA directory and returns the torch model, in float32 and ready to evaluate.

  Args:
    directory: where to.
    text, vision: overrides of the towers' configs.
    layout: "transformers": what save_pretrained of the installed version writes; or one of LAYOUTS.
    max_shard_size: of a weight file, as save_pretrained takes it.
    seed: of the weights.
    **overrides: of the LlavaConfig.
  """
  tokenizer = make_tokenizer()
  config = transformers.LlavaConfig(
    vision_config=vision_config(**(vision or {})),
    text_config=text_config(tokenizer, **(text or {})),
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    **overrides,
  )
  model = transformers.LlavaForConditionalGeneration(config).eval()
  randomise(model, seed)
  model.save_pretrained(directory, max_shard_size=max_shard_size)
  if layout != "transformers":
    os.remove(os.path.join(directory, "model.safetensors"))
    tensors = {rename(name, layout): tensor for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
      del tensors[rename("lm_head.weight", layout)]
    save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
  tokenizer.save_pretrained(directory)
  vision_type = config.vision_config.model_type
  save_image_processor(directory, config.vision_config.image_size, model_type=vision_type)
  return model


def rename(name: str, layout: str) -> str:
  """A name of transformers 5's state dict in one of LAYOUTS."""
  for new, old in LAYOUTS[layout]:
    if name.startswith(new):
      return old + name[len(new) :]
  return name


def make_clip(directory: str, *, whole: bool, seed: int = 1, **vision) -> torch.nn.Module:
  """Writes a CLIP directory, with its text tower or without; returns the torch model."""
  config = vision_config(**vision)
  if whole:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
    model = transformers.CLIPModel(
      transformers.CLIPConfig(
        vision_config=config.to_dict(),
        text_config=text | {"num_attention_heads": 2, "projection_dim": 16},
        projection_dim=16,
      )
    )
  else:
    model = transformers.CLIPVisionModel(config)
  randomise(model.eval(), seed)
  model.save_pretrained(directory)
  save_image_processor(directory, config.image_size)
  return model


def make_siglip(directory: str, *, whole: bool, seed: int = 1, **vision) -> torch.nn.Module:
  """Writes a SigLIP directory, with its text tower or without; returns the torch model."""
  config = vision_config("siglip_vision_model", **vision)
  if whole:
    text = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 64}
    model = transformers.SiglipModel(
      transformers.SiglipConfig(
        vision_config=config.to_dict(), text_config=text | {"num_attention_heads": 2}
      )
    )
  else:
    model = transformers.SiglipVisionModel(config)
  randomise(model.eval(), seed)
  model.save_pretrained(directory)
  save_image_processor(directory, config.image_size, model_type=config.model_type)
  return model


def make_llama(directory: str, *, seed: int = 2, **overrides) -> torch.nn.Module:
  """Writes a LLaMA directory whose tokenizer knows neither `<image>` nor a pad token.

  Args:
    directory: where to.
    seed: of the weights.
    **overrides: of `text_config`; model_type names another language model.
  """
  tokenizer = make_tokenizer(image_token=False)
  config = text_config(tokenizer, **{"vocab_size": len(tokenizer), **overrides})
  model = transformers.AutoModelForCausalLM.from_config(config)
  randomise(model.eval(), seed)
  model.save_pretrained(directory)
  tokenizer.save_pretrained(directory)
  return model
