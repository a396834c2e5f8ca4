"""Latency, image quality, the comparison of two results, and the report."""
