"""Plans under a latency limit: against brute force, mixed with other budgets, and broken tables."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from laptop.cli import main
from laptop.errors import BadInput, Infeasible
from laptop.pruning.budgets import budgets, check_config, conditions
from laptop.pruning.expressible import stock_config
from laptop.pruning.latency_table import with_latencies
from laptop.pruning.plan import check_race, choose
from laptop.pruning.scores import Anatomy, Costs, ScoredUnit, Scores, Unit
from laptop.pruning.settings import PlanConfig
from support.scores import TABLE, brute_force, scores_for, table_for

KNOWN = Anatomy((Unit("a", "resnet", 600, 30), Unit("b", "resnet", 100, 20)), 1000, 100)


def written(folder: Path, table: object) -> str:
    path = folder / "table.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return str(path)


def random_scores(rng: np.random.Generator, count: int = 10) -> Scores:
    params, macs = rng.integers(1_000, 5_000_000, (2, count)).tolist()
    scores = (10 ** rng.uniform(-6, 0, count)).tolist()
    units = tuple(
        ScoredUnit(f"u{i}", "resnet", p, m, ("u1", "u2") if i == 3 else (), score=s)
        for i, (p, m, s) in enumerate(zip(params, macs, scores, strict=True))
    )
    base = Costs(params=2 * sum(params), macs=2 * sum(macs))
    return Scores(model="m", units=units, base=base)


@pytest.mark.parametrize("seed", range(12))
def test_the_plan_is_the_best_under_latency_parameters_and_macs(tmp_path, seed) -> None:
    rng = np.random.default_rng(seed)
    scores = random_scores(rng)
    table, units = table_for(scores, seed), scores.units
    ms = [u["latency_ms"] for u in table["units"]]
    whole, least = table["unet_ms"]["p50"], rng.uniform(0.2, 0.9, 3)
    config = PlanConfig(
        max_latency_ms=whole - least[0] * sum(ms),
        latency_table=written(tmp_path, table),
        max_macs=int(scores.base.macs * (1 - least[1] / 2)),
        ratio=least[2] / 2,
        keep=("u5",),
    )
    savings = [
        (ms, whole - config.max_latency_ms),
        ([u.macs for u in units], scores.base.macs - config.max_macs),
        ([u.params for u in units], config.ratio * scores.base.params),
    ]
    stay = np.array([i == 5 for i in range(10)])
    best = brute_force([u.score for u in units], savings, [(3, [1]), (3, [2])], stay)
    if np.isinf(best):
        with pytest.raises(Infeasible):
            choose(scores, config)
        return
    names = {u.name for u in choose(scores, config)}
    assert scores.predicted_loss(names) == pytest.approx(best, rel=1e-6)
    gone = sum(t for u, t in zip(units, ms, strict=True) if u.name in names)
    assert whole - gone <= config.max_latency_ms + 1e-5


def test_a_limit_goes_with_keep_and_a_stock_config(tiny_pipe, tmp_path) -> None:
    scores = scores_for(tiny_pipe.unet, "fine")
    table = table_for(scores)
    ms = {u["name"]: u["latency_ms"] for u in table["units"]}
    whole = table["unet_ms"]["p50"]
    for expressible, limit in (("any", 0.6 * whole), ("stock", 0.9 * whole)):
        config = PlanConfig(
            max_latency_ms=limit,
            latency_table=written(tmp_path, table),
            keep=("up_blocks.0.*",),
            expressible=expressible,
        )
        names = [u.name for u in choose(scores, config)]
        assert whole - sum(ms[n] for n in names) <= limit
        assert not any(n.startswith("up_blocks.0.") for n in names)
        assert expressible == "any" or stock_config(tiny_pipe.unet, names) is not None


def test_the_rules_that_refinement_keeps_to_have_the_limit(tmp_path) -> None:
    config = PlanConfig(max_latency_ms=6.0, latency_table=written(tmp_path, TABLE))
    rules = conditions(with_latencies(KNOWN, config), config, 4)
    assert rules.hold({1})
    assert not rules.hold({0})


def test_what_cannot_be_reached_is_refused_with_what_can(tmp_path) -> None:
    path = written(tmp_path, TABLE)

    def check(limit: float, **others) -> None:
        config = PlanConfig(max_latency_ms=limit, latency_table=path, **others)
        check_config(config, with_latencies(KNOWN, config), "m")

    message = r"--max-latency-ms 3\.0 needs 7\.000 ms .*hold 6\.512 ms .*Ask for 3\.488 or more"
    with pytest.raises(Infeasible, match=message):
        check(3.0)
    check(3.488)
    with pytest.raises(Infeasible, match=r"Ask for 5\.988 or more"):
        check(5.0, keep=("a",))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match=r"it must be (above 0|a number)"):
            check(limit)


@pytest.mark.parametrize("limit", [3.4, 3.488, 0.1 + 0.2, 1e-3, 12345.678901])
def test_a_limit_in_milliseconds_is_whole_nanoseconds(limit) -> None:
    known = Anatomy((), 1, 1, latency_ns=10**12, latencies_ns={})
    (found,) = budgets(PlanConfig(max_latency_ms=limit, latency_table="t"), known, 4)
    assert 10**12 - found.least == round(limit * 1e6)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{"schema": "laptop.latency-table/1", "un', "not valid JSON"),
        ({"schema": "laptop.bench/1"}, "schema"),
        ({"schema": "laptop.latency-table/1"}, "unet_ms is missing"),
        (TABLE | {"units": [{"name": "a"}]}, r"units\[0\].latency_ms is missing"),
        (TABLE | {"units": TABLE["units"][:1]}, "only in one of both, such as .b.*bench MODEL"),
        (TABLE | {"params": 2000}, "a U-Net of 2000 parameters; this one has 1000"),
        (TABLE | {"params": "many"}, "params is 'many'"),
        (TABLE | {"units": [{"name": 1, "latency_ms": 1}]}, r"units\[0\].name is 1"),
        (TABLE | {"unet_ms": {"p50": 6.0}}, "6.512 ms together, the whole U-Net only 6.000"),
        (TABLE | {"unet_ms": {"p50": 0}}, "must be above 0"),
        *(
            (
                TABLE | {"units": [{"name": "a", "latency_ms": bad}, TABLE["units"][1]]},
                r"units\[0\].lat",
            )
            for bad in (-1, float("nan"), float("inf"), "2", None, True)
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, table, message) -> None:
    config = PlanConfig(max_latency_ms=5.0, latency_table=written(tmp_path, table))
    with pytest.raises(BadInput, match=message):
        with_latencies(KNOWN, config)


def test_a_table_that_cannot_be_trusted_says_so(tmp_path, capsys) -> None:
    table = TABLE | {"invalid_reasons": ["3 samples; 20 are needed"]}
    config = PlanConfig(max_latency_ms=5.0, latency_table=written(tmp_path, table))
    with_latencies(KNOWN, config)
    assert "cannot be trusted: ['3 samples" in capsys.readouterr().err


def test_limit_and_table_go_together_and_without_them_nothing_changes() -> None:
    assert with_latencies(KNOWN, PlanConfig(ratio=0.3)) is KNOWN
    with pytest.raises(BadInput, match=r"--max-latency-ms 3 needs .*--latency-table T"):
        with_latencies(KNOWN, PlanConfig(max_latency_ms=3.0))
    with pytest.raises(BadInput, match="does not exist"):
        with_latencies(KNOWN, PlanConfig(max_latency_ms=3.0, latency_table="no-such.json"))
    with pytest.raises(BadInput, match=r"--latency-table t\.json is there without a limit"):
        with_latencies(KNOWN, PlanConfig(latency_table="t.json"))


def test_a_race_for_a_ratio_is_none_for_a_latency() -> None:
    with pytest.raises(BadInput, match="no other limit"):
        check_race(0.5, PlanConfig(max_latency_ms=3.0, latency_table="t"), "scores")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def scored(tiny_folder, tmp_path_factory) -> Path:
    """A folder with scores and a table of the untrained model, made by the commands."""
    folder = tmp_path_factory.mktemp("latency")
    (folder / "r.toml").write_text(
        "[score]\nsamples = 2\nsteps = 2\n[prompts]\ncalibration = 1\n"
        "[bench]\nrounds = 2\niterations = 4\nseconds = 0.0\nwarmup_s = 0.0\nthreads = 1\n"
    )
    for args in (
        ["score", "--model", tiny_folder, "-o", folder / "scores"],
        ["bench", tiny_folder, "--layers", "--allow-invalid", "-o", folder / "table.json"],
    ):
        result = run(*args, "-c", folder / "r.toml")
        assert result.exit_code == 0, result.output
    assert "all of these" in result.stdout
    assert "20 are needed" in result.stdout
    return folder


def test_a_table_becomes_a_plan_and_another_table_another_plan(scored, tmp_path) -> None:
    table = json.loads((scored / "table.json").read_text())
    ms = {u["name"]: u["latency_ms"] for u in table["units"]}
    limit = table["unet_ms"]["p50"] - sum(ms.values()) / 2
    path, out = written(tmp_path, table), tmp_path / "plan.json"
    command = ["plan", scored / "scores", "--max-latency-ms", limit, "--latency-table", path]
    result = run(*command, "--refine", 3, "-o", out)
    assert result.exit_code == 0, result.output
    assert "predicted latency" in result.stdout
    plan = json.loads(out.read_text())
    found = plan["latency_ms"]
    assert found["before"] == pytest.approx(table["unet_ms"]["p50"], abs=1e-6)
    assert found["after"] <= limit + 1e-6
    gone = sum(ms[n] for n in plan["remove"])
    assert found["before"] - found["after"] == pytest.approx(gone, abs=1e-4)
    assert plan["budget"]["ratio"] is None
    assert "up to date" in run(*command, "--refine", 3, "-o", out).stderr
    written(tmp_path, table | {"device": "another"})
    again = run(*command, "--refine", 3, "-o", out)
    assert again.exit_code == 1
    assert "input latency_table changed" in again.output


def test_a_recipe_can_hold_the_limit(scored, tmp_path) -> None:
    recipe = tmp_path / "plan.toml"
    table = (scored / "table.json").as_posix()
    recipe.write_text(f'[plan]\nmax_latency_ms = 1e-6\nlatency_table = "{table}"\n')
    result = run("plan", scored / "scores", "-c", recipe, "-o", tmp_path / "plan.json")
    assert result.exit_code == 1
    assert "--max-latency-ms 1e-06 needs" in result.output


def test_compress_checks_the_limit_before_it_starts(tiny_folder, scored, tmp_path) -> None:
    out, table = tmp_path / "run", scored / "table.json"
    for options, words in [
        (["--max-latency-ms", 3], "pass --latency-table T"),
        (
            ["--granularity", "coarse", "--max-latency-ms", 3, "--latency-table", table],
            "with granularity 'fine'",
        ),
    ]:
        result = run("compress", "--model", tiny_folder, *options, "-o", out)
        assert result.exit_code == 1, result.output
        assert words in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["bench", "m", "--layers", "--against", "n"], "--against with --layers"),
        (["bench", "m", "--layers", "--component", "unet"], "--component with --layers"),
        (["bench", "m", "--layers", "--runtime", "pytorch,onnxruntime"], "more than one --runtime"),
        (["bench", "m", "--resolution", 64], "--resolution without --layers"),
        (["bench", "m", "--python", "p"], "--python is for boards"),
        (["bench", "m", "--granularity", "fine"], "--granularity without --layers"),
        (["plan", "s", "--menu", "--max-latency-ms", 3], "--max-latency-ms with --menu"),
        (["plan", "--model", "m", "--preset", "bk-base", "--latency-table", "t"], "a preset"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(tmp_path, args, words) -> None:
    result = run(*args, "-o", tmp_path / "x.json")
    assert result.exit_code == 2
    assert words in result.output
