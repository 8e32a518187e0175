"""docs/from_vision_llm_alignment.md names every flag of the original, and only keys that exist."""

import pathlib
import re

import pytest
from ml_collections import ConfigDict

from configs import dpo, ppo, predict, reward, sft
from vlalign_jax import config

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "from_vision_llm_alignment.md"

# The flags of the five commands on the original's page.
TRAINING = """data_path dataset_names dataset_samples dataset_concatenate_samples deepspeed
enable_mmca_attention gradient_accumulation_steps gradient_checkpointing include
lang_decoder_update master_port max_num_image_per_sample max_seq_len num_train_epochs
num_warmup_steps output_dir per_device_eval_batch_size per_device_train_batch_size precision
vis_proj"""
COMMANDS = {
  "SFT": """data_train_split_ratio eval_step image_folder learning_rate lm_model_name_or_path
    template vision_model_name_or_path zero_stage""",
  "Reward model": """eval_data_path image_folder learning_rate lm_reward_model_name_or_path
    ranked_candidate_num vision_reward_model_name_or_path zero_stage""",
  "DPO": """from_checnkpoint learning_rate lm_model_name_or_path ranked_candidate_num
    vision_model_name_or_path zero_stage""",
  "PPO": """actor_learning_rate actor_zero_stage critic_learning_rate critic_zero_stage
    data_train_split_ratio image_folder lm_model_name_or_path lm_reward_model_name_or_path
    ppo_epochs reward_model_ckpt_path sft_model_ckpt_path template vision_model_name_or_path
    vision_reward_model_name_or_path""",
  "Prediction": """batch_size data_path dataset_concatenate_samples dataset_names dataset_samples
    enable_mmca_attention image_folder include lm_model_name_or_path master_port max_seq_len
    output_path precision sft_model_ckpt_path template vision_model_name_or_path""",
}
CONFIGS = {"SFT": sft, "Reward model": reward, "DPO": dpo, "PPO": ppo, "Prediction": predict}
SHARED = "All training commands"


def sections() -> dict[str, str]:
  parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
  return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[tuple[str, str]]:
  """(flag, what stands in the column of keys) of a section's tables."""
  lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `--")]
  return [(flag.strip(" `").removeprefix("--"), keys) for flag, keys in lines]


def quoted(text: str) -> list[str]:
  return re.findall(r"`([^`]+)`", text)


def flat(c: ConfigDict, prefix: str = "") -> set[str]:
  found = set()
  for key in c:
    group = isinstance(c[key], ConfigDict)
    found |= flat(c[key], f"{prefix}{key}.") if group else {f"{prefix}{key}"}
  return found


def keys_of(module) -> set[str]:
  """Every key of a stage's config, the same in all of its presets."""
  presets = getattr(module, "PRESETS", None)
  found = [flat(module.get_config(*([preset] if preset else []))) for preset in presets or [None]]
  assert all(keys == found[0] for keys in found)
  return found[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_page_has_its_row(command):
  text = sections()
  expected = set(COMMANDS[command].split())
  found = {flag for flag, _ in rows(text[command])}
  if command != "Prediction":
    expected |= set(TRAINING.split())
    found |= {flag for flag, _ in rows(text[SHARED])}
  assert expected <= found


def test_each_flag_stands_once_in_a_section():
  for section, text in sections().items():
    flags = [flag for flag, _ in rows(text)]
    assert len(flags) == len(set(flags)), section


@pytest.mark.parametrize("command", COMMANDS)
def test_every_named_key_exists(command):
  known = keys_of(CONFIGS[command])
  text = sections()
  named = rows(text[command]) + (rows(text[SHARED]) if command != "Prediction" else [])
  for flag, cell in named:
    for key in quoted(cell):
      assert key == "--workdir" or key in known, f"--{flag}: {key}"


def test_every_key_in_the_text_exists():
  """Also in the remarks and with values, such as `ppo.gamma=0.99`, of the type that the key has."""
  configs = {name: module.get_config() for name, module in CONFIGS.items()}
  known = {name: keys_of(module) for name, module in CONFIGS.items()}
  groups = {key.split(".")[0] for keys in known.values() for key in keys if "." in key}
  checked = 0
  for section, text in sections().items():
    for token in quoted(text):
      key, _, value = token.partition("=")
      if key.split(".")[0] not in groups or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key):
        continue
      where = [section] if section in known else [name for name in known if key in known[name]]
      assert where, token
      assert key in known[where[0]], token
      group, _, name = key.rpartition(".")
      kind = config.value(configs[where[0]], group).get_type(name)
      if value and kind is bool:
        assert value in ("true", "false"), token
      elif value:
        kind(value)
      checked += 1
  assert checked > 80
