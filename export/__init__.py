"""From a model to the files that devices run, and the proof that they compute the same."""
