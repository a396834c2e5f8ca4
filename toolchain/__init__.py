"""LAPTOP-Diff toolchain: layer pruning and normalized distillation of diffusion models, to devices.

Stages: `laptop.pruning` <- `laptop.distill` <- `laptop.export` <- `laptop.benchmarks`, each a
function from values and folders to a folder; `laptop.compress` chains them. Importing this package
imports no torch.
"""

__version__ = "0.1.0"
