"""LAPTOP-Diff toolchain: layer pruning and normalized distillation of diffusion models, to devices.

Stages: `laptop.pruning` <- `laptop.distill` <- `laptop.export` <- `laptop.benchmarks`, each a
function from values and folders to a folder; `laptop.compress` chains them. Importing this package
imports no torch.
"""

import logging

__version__ = "0.1.0"

# ExecuTorch brings torchao, which diffusers imports wherever it is. It warns of libraries for GPUs
# and of its own deprecated calls: nothing that a user could mend.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
