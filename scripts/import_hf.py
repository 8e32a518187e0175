"""Imports a checkpoint of Vision-LLM-Alignment as a Hugging Face directory.

  python scripts/import_hf.py --from-original=DIR --output=HF_DIR --allow-pickle \
    --vision=models/clip-vit-large-patch14 --language=models/llama-3-8b-instruct

DIR has the pytorch_model.bin that the original saved, such as OUTPUT/epoch-2. It has no config of
the towers, so name their directories as in the original's commands; no weights are read from them.
The output is as scripts/export_hf.py writes it: use it as model.init_from or, if it is a reward
model, as ppo.reward_model. Needs PyTorch (pip install torch).
"""

import os

import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from vlalign_jax import cli
from vlalign_jax.config import DTYPES
from vlalign_jax.errors import InputError
from vlalign_jax.models import vlm
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.weights import export, load, original


def import_original(
  directory: str,
  output: str,
  *,
  vision: str,
  language: str,
  allow_pickle: bool = False,
  lora: str | None = None,
  mmca: bool = False,
  dtype: str | None = None,
) -> None:
  """Writes a checkpoint of Vision-LLM-Alignment as a Hugging Face directory.

  Args:
    directory: has pytorch_model.bin.
    output: a directory that does not exist yet or is empty.
    vision, language, lora, mmca: see `original.open_original`.
    allow_pickle: must be true.
    dtype: of the written weights; None: as in the checkpoint.

  Raises:
    InputError: pickles are not allowed, or the checkpoint cannot be imported.
  """
  required = {"--from-original": directory, "--output": output}
  required |= {"--vision": vision, "--language": language}
  for flag, value in required.items():
    if not value:
      raise InputError(f"{flag} is missing; --help says what it is")
  path = os.path.join(directory, original.WEIGHTS)
  if not os.path.isfile(path):
    raise InputError(f"{path} is missing; the original saves one in OUTPUT/epoch-N")
  if not allow_pickle:
    raise InputError(
      f"{path} is a pickle, and a pickle may hold code that runs when it is read; if you trust "
      "whoever made it, add --allow-pickle (only tensors are read even so)"
    )
  export.check_output(output)
  opened = original.open_original(directory, vision, language, lora=lora, mmca=mmca)
  _, abstract = vlm.abstract_params(opened.config, param_dtype=original.dtype_of(opened))
  mesh = meshes.make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}))
  abstract = meshes.place(abstract, zero.shardings(mesh, abstract, split=True))
  params = load.load_params(opened, abstract)
  export.export_model(opened, params, output, dtype=np.dtype(dtype) if dtype else None)
  logging.info("imported %s to %s", path, output)


def main(_):
  args = flags.FLAGS
  import_original(
    args["from-original"].value,
    args.output,
    vision=args.vision,
    language=args.language,
    allow_pickle=args["allow-pickle"].value,
    lora=args.lora,
    mmca=args.mmca,
    dtype=args.dtype,
  )


if __name__ == "__main__":
  flags.DEFINE_string("from-original", "", "The directory that Vision-LLM-Alignment saved.")
  flags.DEFINE_string("output", "", "The directory to write; must be empty or missing.")
  flags.DEFINE_string("vision", "", "The CLIP directory that the model was built from.")
  flags.DEFINE_string("language", "", "The language model's directory that it was built from.")
  flags.DEFINE_bool("allow-pickle", False, "Read a pickle, which may have code.")
  flags.DEFINE_enum("lora", None, original.LORA, "The kind of adapters in the checkpoint.")
  flags.DEFINE_bool("mmca", False, "The model was trained with --enable_mmca_attention.")
  flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights; default: as in the checkpoint.")
  cli.run(main)
