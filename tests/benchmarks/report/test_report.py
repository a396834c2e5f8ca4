"""The report, on a run folder with the real file formats and made-up numbers."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from laptop.benchmarks.bench_report import BenchRow
from laptop.benchmarks.report import figures, latency_section, page
from laptop.benchmarks.report.report import write_report
from laptop.benchmarks.report.run_files import network_order
from laptop.benchmarks.report.text import number, scaled
from laptop.errors import BadInput
from laptop.records import built
from support.run_folder import UNITS, bench_row, write, write_plan, write_run


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run that was killed after its plan."""
    write_plan(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file, and its report."""
    run = tmp_path_factory.mktemp("report")
    write_run(run)
    write_report(run)
    return run


def section(markdown: str, title: str) -> str:
    return markdown.split(f"## {title}")[1].split("\n## ")[0]


def row_of(markdown: str, first: str) -> list[str]:
    line = next(x for x in markdown.splitlines() if x.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_table_of_the_three_has_what_was_measured_and_dashes_for_the_rest(
    reported: Path,
) -> None:
    text = (reported / "report.md").read_text()
    assert row_of(text, "U-Net parameters") == ["3.52 M", "1.75 M", "1.75 M"]
    assert row_of(text, "MACs of a U-Net call") == ["61 M", "30.5 M", "30.5 M"]
    assert row_of(text, "U-Net weights on disk") == ["7.05 MB", "—", "3.6 MB"]
    assert row_of(text, "PyTorch, p50") == ["12.5 ms", "—", "7.25 ms"]
    assert row_of(text, "ONNX Runtime, × teacher") == ["—", "—", "0.58 (0.57–0.60) †"]
    assert row_of(text, "Prompt accuracy") == ["93.0 %", "12.0 %", "88.0 %"]
    assert row_of(text, "PSNR to the teacher's picture") == ["—", "11.2 dB", "22.8 dB"]


def test_the_headline_says_the_main_numbers(reported: Path) -> None:
    line = next(x for x in (reported / "report.md").read_text().splitlines() if x[:1] == ">")
    for part in ("3.52 M", "1.75 M", "50.4 %", "0.58 ×", "88.0 %", "94.6 % of the teacher's"):
        assert part in line, line


def test_what_was_not_run_is_never_shown_as_verified_nor_a_bad_row_as_valid(
    reported: Path,
) -> None:
    text = (reported / "report.md").read_text()
    coreml = next(x for x in section(text, "Parity").splitlines() if "coreml" in x)
    assert "converted, not run here" in coreml
    assert "verified" not in coreml
    assert "0.58 × the teacher's time** in PyTorch (measurement not valid" in text
    students = [x for x in section(text, "Latency").splitlines() if x.startswith("| distilled")]
    assert len(students) == 2
    assert all("| **no** |" in x for x in students)
    assert (
        "Not valid: cv 0.20 is above 0.10: the machine was busy or hot: distilled in PyTorch,"
        in text
    )


def test_reasons_that_rows_share_are_told_once() -> None:
    rows = [
        built(bench_row(label, "pytorch", 1.0, valid=False) | {"invalid_reasons": reasons},
              BenchRow, label)
        for label, reasons in (
            ("teacher", ["3 rounds; 6 are needed", "cv 0.20 is above 0.10"]),
            ("student", ["3 rounds; 6 are needed", "cv 0.31 is above 0.10", "began: hot"]),
        )
    ]  # fmt: skip
    assert latency_section._reasons(rows) == [
        "- Not valid: 3 rounds; 6 are needed: every row.",
        "- Not valid: cv … is above 0.10: teacher in PyTorch (0.20), distilled in PyTorch (0.31).",
        "- Not valid: began: hot: distilled in PyTorch.",
    ]


def test_the_page_is_self_contained_and_has_every_section(reported: Path) -> None:
    html = (reported / "report.html").read_text()
    assert not re.search(r"(src|href|srcset)=\"(?!data:|#)", html)
    assert "default-src 'none'" in html
    assert html.count("<picture>") == 3, "charts and curves follow the colour scheme"
    for title in ("Pictures", "What was removed", "Distillation", "Latency", "Image quality",
                  "Parity", "Use it elsewhere", "How it was made"):  # fmt: skip
        assert f">{title}</h2>" in html
    assert "DiffusionPipeline.from_pretrained(&quot;model&quot;, trust_remote_code=True)" in html
    assert "ORTStableDiffusionXLPipeline" in html
    assert "artifacts/coreml/unet.mlpackage" in html
    assert "steps = 900" in html


def test_a_run_without_the_optional_parts_still_has_a_report(bare_run: Path) -> None:
    html = write_report(bare_run).read_text()
    text = (bare_run / "report.md").read_text()
    assert row_of(text, "Prompt accuracy") == ["—", "—", "—"]
    assert "0.021 predicted" in text
    assert "— measured" in text
    for absent in ("Pictures", "Distillation", "Latency", "Parity", "Use it elsewhere"):
        assert f">{absent}</h2>" not in html


def test_a_folder_without_a_plan_and_a_broken_file_are_refused(bare_run: Path) -> None:
    write(bare_run / "eval" / "eval.json", '{"schema": "laptop.ev')
    with pytest.raises(BadInput, match=r"eval\.json is not valid JSON"):
        write_report(bare_run)
    (bare_run / "plan.json").unlink()
    with pytest.raises(BadInput, match=r"needed is a run folder.*plan\.json"):
        write_report(bare_run)


def test_foreign_text_cannot_become_markup(bare_run: Path) -> None:
    plan = json.loads((bare_run / "plan.json").read_text())
    write(
        bare_run / "plan.json",
        plan | {"model": "<script>alert(1)</script> *x* | ![](/etc/passwd)"},
    )
    html = write_report(bare_run).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; *x* | ![](/etc/passwd)" in html


def test_layers_are_listed_in_the_order_of_the_data_flow() -> None:
    ordered = [figures.short_name(n) for n in sorted(UNITS, key=network_order)]
    assert ordered == [
        "down 0 · resnet 0", "down 0 · attn 0.0", "down 0 · resnet 1",
        "mid · resnet 0", "mid · attn 0.0", "mid · resnet 1",
        "up 0 · resnet 0", "up 0 · attn 0.0", "up 0 · resnet 1",
    ]  # fmt: skip


def test_small_pictures_are_enlarged_pixel_by_pixel(reported: Path) -> None:
    with Image.open(reported / "images" / "grid.png") as grid:
        assert grid.size[0] == 3 * figures.CELL + 2 * figures.GAP + 1
        with Image.open(reported / "eval" / "images" / "teacher" / "000.png") as small:
            for x, y in ((0, 0), (31, 17), (63, 63)):
                big = grid.getpixel((4 * x + 2, 60 + 4 * y + 2))
                assert big == (*small.getpixel((x, y)), 255)


def test_numbers_are_short() -> None:
    assert number(None) == scaled(None) == "—"
    assert [number(v) for v in (0.02134, 118.24, 1234.5, 0)] == ["0.0213", "118", "1234", "0"]
    assert [scaled(v, "B") for v in (999, 1500, 7_050_000)] == ["999 B", "1.5 kB", "7.05 MB"]


def test_an_image_becomes_part_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "images/a.png")
    assert '<img src="data:image/png;base64,' in page.render("# T\n\n![x](images/a.png)", tmp_path)
