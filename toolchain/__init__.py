"""LAPTOP-Diff toolchain: layer pruning and normalized distillation of diffusion models, to devices.

Stages: `laptop.pruning` <- `laptop.distill` <- `laptop.export` <- `laptop.benchmarks`, each a
function from values and folders to a folder; `laptop.compress` chains them. Importing this package
imports no torch.
"""

import logging
import os

__version__ = "0.1.0"

# No telemetry: ONNX Runtime's is on by default since 1.32, and it looks when it is imported.
for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(name, "1")

# ExecuTorch brings torchao, which diffusers imports wherever it is. It warns of libraries for GPUs
# and of its own deprecated calls: nothing that a user could mend.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
