"""The distilled student as a folder to share, with its model card."""

import shutil
from pathlib import Path

from laptop.files import MANIFEST, files_in
from laptop.models.unet_classes import SHIPPED_CLASS
from laptop.pruning.plan_file import Plan
from laptop.run import Overwrite, run_stage


def publish(run: Path, out: Path, *, overwrite: Overwrite = False) -> Path:
    """The distilled student as a model folder to share: weights, class file, plan, model card."""
    plan = Plan.read(run / "plan.json")

    def work(folder: Path) -> None:
        for path in files_in(run / "distill"):
            target = folder / path.relative_to(run / "distill")
            target.parent.mkdir(exist_ok=True)
            if path.name == SHIPPED_CLASS.name:
                shutil.copy2(SHIPPED_CLASS, target)  # never a class file from elsewhere
            elif path.name not in (MANIFEST, "metrics.jsonl"):
                shutil.copy2(path, target)
        shutil.copy2(run / "plan.json", folder / "plan.json")
        (folder / "README.md").write_text(model_card(plan), encoding="utf-8")

    inputs = {"distill": run / "distill", "plan": run / "plan.json"}
    return run_stage("model", out, {}, inputs, work, overwrite=overwrite)


def model_card(plan: Plan) -> str:
    """README.md of a published student."""
    params, macs = plan.params, plan.macs
    forward = (
        f" and\n{macs.after / 1e9:.4g} of {macs.before / 1e9:.4g} GMACs a forward" if macs else ""
    )
    removed = "\n".join(f"- `{name}`" for name in plan.remove)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [laptop-diff, pruned]
---

# {plan.model}, compressed by layer pruning and distillation

The U-Net has {params.after:,} of {params.before:,} parameters{forward}.
Made by `laptop compress`; the plan is in `plan.json`.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH", trust_remote_code=True)
```

`trust_remote_code` lets diffusers import `unet/laptop_unet_v1.py`, a small U-Net class that leaves
the removed layers out. A folder whose `unet/` has no such file does not need it.

Removed layers:

{removed}
"""
