"""LAPTOP-Diff toolchain: layer pruning and normalized distillation of diffusion models, to devices.

Stages: `laptop.pruning` <- `laptop.distill` <- `laptop.export` <- `laptop.benchmarks`, each a
function from values and folders to a folder; `laptop.compress` chains them. Importing this package
imports no torch.
"""

import logging
import os

__version__ = "0.1.0"

# No telemetry: ONNX Runtime's is on by default since 1.32, and it looks when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# ExecuTorch brings torchao, which diffusers imports wherever it is. It warns of libraries for GPUs
# and of its own deprecated calls: nothing that a user could mend.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
