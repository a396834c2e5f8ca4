"""Retrain a pruned student by normalized feature distillation: data, features, losses, trainer."""
