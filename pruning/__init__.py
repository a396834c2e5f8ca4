"""The layers that can go, their scores, the plan that drops some, and the pruned model."""
