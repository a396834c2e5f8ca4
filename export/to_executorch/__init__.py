"""The target `executorch`."""
