"""What a run will compute, before it does: U-Net evaluations and multiply-accumulates."""

from typing import Any

from laptop.models import loading
from laptop.models.description import context_length
from laptop.pruning import budgets as limits
from laptop.pruning.latency_table import with_latencies
from laptop.pruning.sampling_choice import choose_sampling
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.pruning.score import forwards_spent
from laptop.pruning.scores import Anatomy
from laptop.pruning.units import anatomy_of
from laptop.recipe import Recipe
from laptop.training_data import ENDLESS


def removable(recipe: Recipe) -> Anatomy:
    """The layers that can be removed, with what the recipe's budgets need to know of them."""
    unet, tokens = loading.empty_unet(recipe.model), context_length(recipe.model)
    return with_latencies(anatomy_of(unet, tokens, recipe.score.granularity), recipe.plan)


def samplings(recipe: Recipe) -> dict[str, Sampling]:
    """How the stages draw that draw the most; `BadInput` for what the model cannot."""
    own = {"score": recipe.score.steps, "data": recipe.data.steps, "eval": recipe.eval.steps}
    guided = SamplingConfig(guidance=recipe.eval.guidance).over(recipe.sampling)
    return {
        name: choose_sampling(
            recipe.model, guided if name == "eval" else recipe.sampling, steps=steps
        )
        for name, steps in own.items()
    }


def estimate(recipe: Recipe) -> dict[str, Any]:
    """What a run will compute, in U-Net evaluations and multiply-accumulates; runs nothing."""
    anatomy = removable(recipe)
    asked = limits.budgets(recipe.plan, anatomy, limits.bytes_each(recipe.plan, recipe.model))
    keep = 1 - max((b.least for b in asked if b.cost == "params"), default=0) / anatomy.params
    rows = recipe.score.samples
    is_drawn = recipe.data.source.partition(":")[0] == "prompts"
    each = {name: s.rows * s.steps for name, s in samplings(recipe).items()}
    trajectory = max(each["score"] * recipe.prompts.calibration, rows)  # `prompts_needed`
    forwards = {
        "score": trajectory + round(rows * forwards_spent(anatomy, anatomy.units)),
        "plan": rows,
        "data": each["data"] * (recipe.data.count or ENDLESS) * is_drawn,
        "distill": round(recipe.distill.steps * recipe.distill.batch_size * (1 + 3 * keep)),
        "eval": round(each["eval"] * recipe.eval.prompts * (1 + 2 * keep)),
    }
    return {
        "unet": {"params": anatomy.params, "macs": anatomy.macs, "units": len(anatomy.units)},
        "largest_ratio": anatomy.largest_ratio,
        "teacher_evaluations": forwards,
        "tera_macs": {k: round(v * anatomy.macs / 1e12, 3) for k, v in forwards.items()},
    }
