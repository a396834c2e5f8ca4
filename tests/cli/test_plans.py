"""What `laptop plan` says: the same command for a plan, a menu and (`test_presets`) a preset."""

from click.testing import CliRunner

from laptop.cli import main


def test_a_plan_and_a_menu_are_told_in_full(tiny_folder, tmp_path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[score]\nsamples = 2\nsteps = 2\n[prompts]\ncalibration = 1\n")
    scores, plan, menu = tmp_path / "scores", tmp_path / "plan.json", tmp_path / "menu.json"
    for args, words in [
        (["score", "--model", tiny_folder, "-c", recipe, "-o", scores], ["parameters"]),
        (
            ["plan", scores, "--ratio", 0.2, "--expressible", "stock", "-o", plan],
            ["Remove ", "predicted loss", "measured", "  up_blocks", "Without --expressible stock"],
        ),
        (["plan", scores, "--menu", "-o", menu], ["ratio ", "\n0.50", "menu.svg"]),
    ]:
        result = CliRunner().invoke(main, [str(a) for a in args])
        assert result.exit_code == 0, result.output
        for text in words:
            assert text in result.stdout, result.stdout
    assert menu.with_suffix(".svg").is_file()
    precious = tmp_path / "other.svg"
    precious.write_text("precious")
    args = ["plan", str(scores), "--menu", "-o", str(precious.with_suffix(".json"))]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    assert "other.svg exists, where the chart would be written" in result.stderr
    assert precious.read_text() == "precious"


def test_a_menu_takes_no_budget(tmp_path) -> None:
    args = ["plan", "scores", "--menu", "--ratio", "0.5", "-o", str(tmp_path / "menu.json")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert "--ratio with --menu" in result.output
