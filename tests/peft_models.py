"""Adapters in the library peft, on a tiny torch LLaVA, and our config for the same ones."""

import peft
import torch

from tests import parity
from vlalign_jax.stages import defaults
from vlalign_jax.weights import names, source
from vlalign_jax.weights import peft as peft_format

LANGUAGE = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
# The last of three vision layers is behind the features that are used.
VISION = r"model\.vision_tower\.encoder\.layers\.\d+\.(self_attn|mlp)\.(\w+_proj|fc\d)"
PROJECTOR = r"model\.multi_modal_projector\.linear_\d"


def add(model: torch.nn.Module, seed: int = 0, **options) -> peft.PeftModel:
  """The model with adapters that change what it says; `options` are of peft.LoraConfig."""
  with torch.random.fork_rng():
    torch.manual_seed(seed)  # of the first matrices
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, param in adapted.named_parameters():
      if "lora_B" in name:
        param.copy_(0.3 * torch.randn(param.shape, generator=generator))
  return adapted


def config_for(model: str, **lora):
  """A config of SFT in float32 that starts from a model directory with adapters."""
  config = defaults("sft")
  config.model.update(init_from=str(model), dtype="float32")
  config.lora.update(lora)
  return config


def open_model(model: str, **lora):
  """(source, graphdef, params) of a model directory with adapters; `lora` as in the config."""
  opened = source.open_for(config_for(model, **lora))
  return opened, *parity.load_all(opened)


def as_params(config, adapted: peft.PeftModel, of=lambda param: param.detach()) -> dict:
  """Path -> array of our adapters, from peft's modules; `of` gives their gradients, say."""
  found = {name.replace(".default", ""): param for name, param in adapted.named_parameters()}
  params = {}
  for name in peft_format.names_of(config):
    tensors = [
      peft_format.PREFIX + peft_format.module_name(name.tensor.format(layer))
      for layer in names.layers_of(name, config)
    ]
    arrays = [of(found[tensor]).numpy().T for tensor in tensors]
    params[name.path] = arrays if name.stacked else arrays[0]
  return params
