"""The conditions of a plan: budgets, layers that stay, layers that go only with others.

Budgets are any mix of parameters, bytes of weights, multiply-accumulates and measured latency;
layers can be kept by pattern, and a plan can be restricted to stock diffusers configs.
"""

import itertools
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from laptop.errors import BadInput, Infeasible, Unsupported
from laptop.models import locating
from laptop.models.precision import stored_dtype
from laptop.pruning.scores import Anatomy, Unit
from laptop.pruning.settings import DEFAULT_RATIO, PlanConfig

NOUNS = {  # the unit of a million of each cost, and what it is
    "params": ("M", "parameters"),
    "macs": ("M", "multiply-accumulates"),
    "latency_ns": ("ms", "latency"),
}


@dataclass(frozen=True)
class Budget:
    """A limit of the user, as the cost that must be removed for it."""

    flag: str
    cost: str  # key of NOUNS
    least: float  # of the cost, to be removed
    each: float | None  # how many of the flag's units one of the cost is; None for a ratio


def with_default(config: PlanConfig) -> PlanConfig:
    """`config` with the default ratio if it sets no limit at all."""
    limits = (config.ratio, config.max_params, config.max_bytes, config.max_macs)
    is_limited = any(x is not None for x in (*limits, config.max_latency_ms))
    return config if is_limited else replace(config, ratio=DEFAULT_RATIO)


def budgets(config: PlanConfig, anatomy: Anatomy, bytes_each: int) -> list[Budget]:
    """The limits of `config`; `Infeasible` for one that makes no sense."""
    caps: list[tuple[str, float | None, str, float]] = [
        ("--max-params", config.max_params, "params", 1),
        ("--max-bytes", config.max_bytes, "params", bytes_each),
        ("--max-macs", config.max_macs, "macs", 1),
        ("--max-latency-ms", config.max_latency_ms, "latency_ns", 1e-6),
    ]
    ratio = with_default(config).ratio
    limits = []
    if ratio is not None:
        limits.append(Budget(f"--ratio {ratio:g}", "params", ratio * anatomy.params, None))
    for flag, cap, cost, each in caps:
        if cap is None:
            continue
        most = round(cap / each, 3)  # 3.4 ms are 3,400,000 ns, without a float's last digits
        limits.append(
            Budget(f"{flag} {cap:,}", cost, max(0.0, costs(anatomy, cost)[1] - most), each)
        )
    return limits


def costs(anatomy: Anatomy, cost: str) -> tuple[list[int], int]:
    """The cost that removing each unit saves, and the cost of the whole U-Net."""
    if cost == "latency_ns":
        if anatomy.latency_ns is None:
            raise ValueError("a latency limit needs an anatomy with latencies")
        return [anatomy.latencies_ns[u.name] for u in anatomy.units], anatomy.latency_ns
    return [getattr(u, cost) for u in anatomy.units], getattr(anatomy, cost)


def check_budgets(config: PlanConfig, anatomy: Anatomy, bytes_each: int) -> None:
    """Raise `Infeasible` unless the layers that may go hold what every budget asks for."""
    stays = _stays(anatomy, config)
    for budget in budgets(config, anatomy, bytes_each):
        saved, before = costs(anatomy, budget.cost)
        held = sum(x for u, x in zip(anatomy.units, saved, strict=True) if u.name not in stays)
        if budget.least > held:
            raise Infeasible(_refusal(budget, before, held) + _blame(anatomy, config, stays))


def _refusal(budget: Budget, before: int, held: int) -> str:
    ratio = math.floor(held / before * 1000) / 1000
    if budget.each is None:
        advice = f"{ratio:.3f} or less"
    elif budget.cost == "latency_ns":
        advice = f"{math.ceil((before - held) / 1000) / 1000:,.3f} or more"
    else:
        advice = f"{math.ceil((before - held) * budget.each):,} or more"
    unit, noun = NOUNS[budget.cost]
    digits = 3 if unit == "ms" else 1
    need, whole, most = (f"{x / 1e6:,.{digits}f} {unit}" for x in (budget.least, before, held))
    return (
        f"{budget.flag} needs {need} of the U-Net's {whole} {noun} removed; removable layers hold "
        f"{most} (ratio {ratio:.3f}). Ask for {advice}."
    )


def _blame(anatomy: Anatomy, config: PlanConfig, stays: Set[str]) -> str:
    """A sentence that names the settings that keep layers; "" if no setting does."""
    flags = [
        flag
        for flag, is_set in (
            (f"--keep {' '.join(config.keep)}", bool(config.keep)),
            (f"--expressible {config.expressible}", config.expressible != "any"),
        )
        if is_set
    ]
    if not (flags and stays):
        return ""
    return f" {' and '.join(flags)} keeps {len(stays)} of {len(anatomy.units)} layers."


def _stays(anatomy: Anatomy, config: PlanConfig) -> set[str]:
    """The units that the config keeps, and those that may go only after one of them."""
    mid = _mid_units(anatomy) if config.expressible == "stock" else ()
    stays = {u.name for u in anatomy.units if _is_kept(u, config, mid)}
    implied = implications(anatomy, config.expressible)
    while more := {i for i, others in implied if stays.issuperset(others)} - stays:
        stays |= more
    return stays


def _is_kept(unit: Unit, config: PlanConfig, mid: Sequence[str]) -> bool:
    if any(fnmatchcase(unit.name, pattern) for pattern in config.keep):
        return True
    # In a checkpoint of the original layout ComfyUI knows a U-Net by the depths that come down, and
    # counts those that go up; an empty depth it takes for a missing transformer.
    if config.expressible == "comfyui":
        is_first = unit.name.endswith(".transformer_blocks.0")
        if is_first or not unit.name.startswith("up_blocks."):
            return True
    is_sayable = unit.kind == "transformer_block" or unit.name in mid
    return config.expressible != "any" and not is_sayable


def _mid_units(anatomy: Anatomy) -> tuple[str, ...]:
    """The layers that a stock config can leave out of the mid block: resnet, shell, resnet.

    Or the first resnet alone, if the block has no more; nothing of an unusual mid block.
    """
    usual = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    kinds = {u.name: u.kind for u in anatomy.units if u.name.startswith("mid_block.")}
    outer = {name for name, kind in kinds.items() if kind != "transformer_block"}
    if outer == {usual[0]}:
        return usual[:1]
    is_usual = outer == set(usual) and kinds[usual[1]] == "transformer_shell"
    return usual if is_usual else ()


def implications(anatomy: Anatomy, expressible: str) -> list[tuple[str, tuple[str, ...]]]:
    """Pairs (i, others): the layer i may go only if at least one of the others goes.

    A shell goes after its content. A stock config counts the blocks of a transformer, so that the
    last go first. The mid block's depth is that of the first transformer of the last down
    block, if this has any; or it loses its transformer and second resnet, and then the first too.
    """
    pairs: list[tuple[str, tuple[str, ...]]] = [
        (u.name, (other,)) for u in anatomy.units for other in u.needs
    ]
    if expressible == "any":
        return pairs
    depths: dict[str, list[str]] = {}
    for unit in anatomy.units:
        if unit.kind == "transformer_block":
            depths.setdefault(unit.name.rsplit(".transformer_blocks.", 1)[0], []).append(unit.name)
    for blocks in depths.values():
        pairs += [(a, (b,)) for a, b in itertools.pairwise(blocks)]
    down = [u.name.split(".")[1] for u in anatomy.units if u.name.startswith("down_blocks.")]
    tied = depths.get(f"down_blocks.{max(down, key=int, default='')}.attentions.0", [])
    mid = depths.get("mid_block.attentions.0", [])
    usual = _mid_units(anatomy) if expressible == "stock" else ()
    if len(usual) == 3:
        first, shell, second = usual
        pairs += [(second, (shell,)), (shell, (second,)), (first, (shell,))]
    if len(mid) == len(tied):
        for a, b in zip(mid, tied, strict=True):
            pairs += [(b, (a,)), (a, (b, *usual[1:2]))]  # without its shell it has no depth
    return pairs


@dataclass(frozen=True)
class Conditions:
    """Conditions that a set of layers must meet, in numbers of units."""

    savings: Sequence[tuple[Sequence[int], float]]  # for each budget, costs and the least to save
    implied: Sequence[tuple[int, Sequence[int]]]  # (i, js): i goes only if one of js goes
    stay: Sequence[bool]

    def hold(self, chosen: Set[int]) -> bool:
        """Whether the set `chosen` meets all of them."""
        return (
            all(sum(costs[i] for i in chosen) >= least for costs, least in self.savings)
            and all(any(j in chosen for j in js) for i, js in self.implied if i in chosen)
            and not any(self.stay[i] for i in chosen)
        )


def conditions(anatomy: Anatomy, config: PlanConfig, bytes_each: int) -> Conditions:
    """The conditions of `config`; `Infeasible` when a budget cannot be met."""
    check_budgets(config, anatomy, bytes_each)
    number, stays = {u.name: i for i, u in enumerate(anatomy.units)}, _stays(anatomy, config)
    return Conditions(
        [(costs(anatomy, b.cost)[0], b.least) for b in budgets(config, anatomy, bytes_each)],
        [
            (number[i], [number[j] for j in js])
            for i, js in implications(anatomy, config.expressible)
        ],
        [u.name in stays for u in anatomy.units],
    )


def check_config(config: PlanConfig, anatomy: Anatomy, model: str) -> None:
    """Raise `BadInput` for a config that cannot be met, before anything is scored or solved."""
    if not anatomy.units:
        raise Unsupported(f"the U-Net of {model} has no layer left that can be removed.")
    if config.expressible != "any":
        _check_restriction(config, anatomy, model)
    for pattern in config.keep:
        if not any(fnmatchcase(u.name, pattern) for u in anatomy.units):
            raise BadInput(
                f"--keep {pattern!r} names no removable layer; a layer is called, for example, "
                f"{anatomy.units[0].name}."
            )
    check_budgets(config, anatomy, bytes_each(config, model))


def _check_restriction(config: PlanConfig, anatomy: Anatomy, model: str) -> None:
    kinds = {u.kind for u in anatomy.units}
    if "transformer_block" not in kinds:
        remedy = "Score with --granularity fine." if kinds - {"resnet", "attention"} else ""
        raise BadInput(
            f"--expressible {config.expressible} drops transformer blocks, which these scores do "
            f"not have as layers. {remedy}".rstrip()
        )
    if locating.unet_config(model).get("removed"):
        raise BadInput(
            f"--expressible {config.expressible}: {model} is pruned already, in a way that no "
            "stock config can say. Plan from the original model."
        )


def bytes_each(config: PlanConfig, model: str) -> int:
    """Bytes of a stored weight; 4 without a budget of bytes, which needs no look at the files."""
    return stored_dtype(model).itemsize if config.max_bytes is not None else 4
