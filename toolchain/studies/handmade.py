"""Hand-made plans for `tiny-sdxl`: the layers that makers of small SD models remove, in order.

Their plans (`laptop.pruning.presets`) are of one size each and do not fit this model. A family here
is their idea as an order of layers; the first ones go, until a pruning ratio is reached.

- `bk`     BK-SDM (arXiv 2305.15798): the mid block, the second resnet and transformer of each down
           block, the middle ones of each up block, then the innermost level (its `tiny`).
- `ssd`    SSD-1B and Vega (arXiv 2401.02677): transformers keep their first block and the mid block
           one resnet; where that is not enough, second and middle resnets go, never a transformer.
- `koala`  KOALA (arXiv 2312.04005): both, shallow transformers first, then layers as in BK-SDM.

At ratios that none of the originals has, the last layers of the up blocks follow, and then what is
left. Inner levels go first wherever there is a choice, as in the originals.
"""

import fnmatch
from collections.abc import Sequence

from laptop.pruning.scores import Unit

DEPTH = ["*.transformer_blocks.[1-9]"]  # all but the first
MID = ["mid_block.attentions.*", "mid_block.resnets.1", "mid_block.*"]
INNERMOST = ["down_blocks.2.*", "up_blocks.0.*"]


def _layers(kinds: Sequence[str], down: Sequence[int], up: Sequence[int]) -> list[str]:
    """Patterns of the `down`-th layers of the down blocks, then the `up`-th of the up blocks."""
    return [
        f"{side}_blocks.{block}.{kind}.{layer}*"
        for side, blocks, layers in (("down", (2, 1, 0), down), ("up", (0, 1, 2), up))
        for layer in layers
        for block in blocks
        for kind in kinds
    ]


RESNETS, PAIRS = ["resnets"], ["resnets", "attentions"]
REST = [*_layers(PAIRS, [], [2]), *_layers(PAIRS, [0], [0]), "*"]
FAMILIES = {
    "bk": [*MID, *_layers(PAIRS, [1], [1]), *INNERMOST, *REST],
    "ssd": [
        *DEPTH,
        *MID[:2],
        *_layers(RESNETS, [1], [1]),
        "mid_block.*",
        *INNERMOST,
        *_layers(RESNETS, [], [2]),
        *REST,
    ],
    "koala": [*DEPTH, *MID, *_layers(PAIRS, [1], [1]), *INNERMOST, *REST],
}


def handmade(family: str, units: Sequence[Unit], ratio: float, params: int) -> list[str]:
    """Names of the layers that go, until `ratio` of `params` is gone and no more layers than that.

    Of the layers that the last one made superfluous, the latest come back first.
    """
    gone: list[Unit] = []
    for unit in _in_order(FAMILIES[family], units):
        if _size(gone) >= ratio * params:
            break
        gone.append(unit)
    for unit in reversed(gone):
        left = [u for u in gone if u != unit]
        is_needed = any(unit.name in u.needs for u in left)
        if not is_needed and _size(left) >= ratio * params:
            gone = left
    return [u.name for u in gone]


def _in_order(patterns: Sequence[str], units: Sequence[Unit]) -> list[Unit]:
    """All units, by the first pattern that fits; a transformer's shell after its blocks."""
    order: dict[str, Unit] = {}
    by_need = sorted(units, key=lambda u: bool(u.needs))
    for pattern in patterns:
        order |= {u.name: u for u in by_need if fnmatch.fnmatch(u.name, pattern)}
    return list(order.values())


def _size(units: Sequence[Unit]) -> int:
    return sum(u.params for u in units)
