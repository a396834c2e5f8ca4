"""Latency: what is timed, in which order, when a number counts."""
