"""The figure of the balance: shares of the feature loss, from lines of a metrics.jsonl."""

from pathlib import Path

from laptop.benchmarks.report.balance import balance_chart, largest_share, loss_shares
from laptop.distill.log_lines import LogLine

NORMS = {"down_blocks.0": 2.0, "mid_block": 20.0}
LINES = [
    LogLine(step=s, features={"down_blocks.0": 1.0, "mid_block": 3.0 - s}, norms=NORMS)
    for s in range(3)
]


def test_shares_are_of_the_feature_loss_at_each_step() -> None:
    assert loss_shares(LINES) == {
        "down_blocks.0": [1 / 4, 1 / 3, 1 / 2],
        "mid_block": [3 / 4, 2 / 3, 1 / 2],
    }
    module, share = largest_share(LINES)
    assert module == "mid_block"
    assert round(share, 3) == round((3 / 4 + 2 / 3 + 1 / 2) / 3, 3)


def test_the_figure_has_every_block_and_every_run(tmp_path: Path) -> None:
    balance_chart({"alpha = 1": LINES, "relative": LINES}, tmp_path / "balance")
    for name in ("balance.svg", "balance-dark.svg"):
        assert (tmp_path / name).stat().st_size > 1000
    before = (tmp_path / "balance.svg").read_bytes()
    balance_chart({"alpha = 1": LINES, "relative": LINES}, tmp_path / "balance")
    assert (tmp_path / "balance.svg").read_bytes() == before
