"""Prediction: answers of a policy, or log-probabilities or scores of given answers.

  python scripts/predict.py --config=configs/predict.py --workdir=predictions/sft \
    --config.model.init_from=runs/sft \
    --config.data.eval=eval.json --config.data.images=images

Best of 8 under a reward model:

  python scripts/predict.py --config=configs/predict.py --workdir=predictions/best_of_8 \
    --config.model.init_from=runs/sft --config.reward_model=runs/reward \
    --config.generation.num_return_sequences=8 --config.generation.temperature=1.0 \
    --config.data.eval=eval.json --config.data.images=images

The other modes take the answers that the records have: `--config.mode=logprobs` gives what a policy
thinks of them, `--config.mode=reward` the scores of the reward model in model.init_from.
"""

from ml_collections import ConfigDict

from vlalign_jax.prediction.settings import defaults


def get_config() -> ConfigDict:
  """The config; every key can be overridden with --config.KEY=VALUE."""
  return defaults()
