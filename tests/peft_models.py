"""Adapters in the library peft, on a tiny torch LLaVA, and our config for the same ones."""

import peft
import torch
import transformers

from tests import parity
from vlalign_jax import trees
from vlalign_jax.stages import defaults
from vlalign_jax.weights import export_adapters, names, source
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
      peft_format.PREFIX + peft_format.module_name(name.tensor.format(layer), config)
      for layer in names.layers_of(name, config)
    ]
    arrays = [of(found[tensor]).numpy().T for tensor in tensors]
    params[name.path] = arrays if name.stacked else arrays[0]
  return params


def check_both_ways(torch_model, directory, modules: str, **lora) -> set[str]:
  """Compares adapters read from peft with peft, and peft with adapters that we write.

  Args:
    torch_model: a LLaVA, saved in `directory`.
    directory: pathlib.Path; adapters are saved below it.
    modules: peft's target_modules.
    **lora: of our config, for the same modules.

  Returns:
    The parts of the model that have adapters.
  """
  adapted = add(torch_model, r=3, lora_alpha=6, lora_dropout=0.0, target_modules=modules)
  adapted.save_pretrained(directory / "peft")
  opened, graphdef, params = open_model(
    str(directory), alpha=6.0, init_from=f"{directory}/peft", **lora
  )
  config = opened.config
  pictures = parity.make_pictures(1, config.vision.image_size)
  example = parity.make_example(config, 20, tuple(pictures))
  rows = parity.make_rows(config, [[example]], pictures, len(example.tokens), 1)
  with torch.no_grad():
    expected = parity.torch_logits(adapted, config, example, pictures)
  assert parity.relative_error(parity.logits(graphdef, params, rows)[0], expected) < 1e-5
  kept = {path: x for path, x in trees.flatten(params).items() if "lora_" in path}
  export_adapters.export_adapters(config, kept, str(directory / "out"))
  base = transformers.LlavaForConditionalGeneration.from_pretrained(directory)
  exported = peft.PeftModel.from_pretrained(base, directory / "out").eval()
  with torch.no_grad():
    logits = parity.torch_logits(exported, config, example, pictures)
  assert parity.relative_error(logits, expected) < 1e-5
  return {path.split("/")[0] for path in kept}
