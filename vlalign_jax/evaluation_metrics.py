"""Lists the evaluation metrics that checkpoints can be ranked by."""

# Stage -> metric that it reports -> whether a higher value is better.
METRICS = {
  "sft": {
    "eval/loss": False,
    "eval/perplexity": False,
    "eval/token_accuracy": True,
    "eval/exact_match": True,
  },
  "reward": {"eval/loss": False, "eval/accuracy": True, "eval/margin": True},
  "dpo": {
    "eval/loss": False,
    "eval/rewards/accuracies": True,
    "eval/rewards/margins": True,
    "eval/logps/accuracies": True,
  },
  "ppo": {"eval/objective/scores": True, "eval/objective/rlhf_reward": True},
}
HIGHER_IS_BETTER = {name: higher for stage in METRICS.values() for name, higher in stage.items()}
