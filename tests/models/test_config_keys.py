"""Every key of every accepted class is in the table, and nothing unknown is ignored."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest

from laptop.errors import Unsupported
from laptop.models.component_classes import CLASSES, SCHEDULERS, SHIPPED_UNETS, STOCK_UNETS, TASKS
from laptop.models.config_keys import TABLE, Refused, check_keys, table_of

STOCK = (*STOCK_UNETS, "AutoencoderKL", "AutoencoderTiny", *SCHEDULERS, *TASKS)
ACCEPTED = (*STOCK, *SHIPPED_UNETS)
NEWER = ("noise_sampler_seed", "s_noise")  # keys of classes that need another package
OLDER = ("predict_epsilon", "tensor_format", "timestep_values")  # of old files


def keys(class_name: str) -> Iterator[inspect.Parameter]:
    """The config keys of an installed class, which its constructor takes."""
    cls = getattr(diffusers, class_name)
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name not in ("self", "args", "kwargs", *CLASSES):
            yield parameter


@pytest.mark.parametrize("class_name", STOCK)
def test_the_table_has_every_key_of_the_installed_class(class_name: str) -> None:
    missing = [p.name for p in keys(class_name) if p.name not in table_of(class_name)]
    assert missing == [], "decide for each: honoured where, refused, or irrelevant because"


def test_the_table_has_no_key_that_no_class_has() -> None:
    for family, rules in TABLE.items():
        classes = {"Scheduler": SCHEDULERS, "Pipeline": tuple(TASKS)}.get(
            family, (family.removeprefix("Laptop"),)
        )
        known = {p.name for c in classes for p in keys(c)} | {*NEWER, *OLDER, "removed", "healed"}
        known |= {"block_out_channels", "force_upcast"}  # which AutoencoderTiny writes itself
        assert {*rules} <= known, family


@pytest.mark.parametrize("class_name", STOCK)
def test_what_the_installed_class_does_by_default_is_taken(class_name: str) -> None:
    config = {p.name: p.default for p in keys(class_name) if p.default is not p.empty}
    check_keys(class_name, config, "model/config.json")


@pytest.mark.parametrize(
    ("class_name", "key", "rule"),
    [(c, k, r) for c in TABLE for k, r in TABLE[c].items() if isinstance(r, Refused)],
)
def test_a_refused_key_is_named_with_its_value_and_a_way_out(
    class_name: str, key: str, rule: Refused
) -> None:
    accepted = {"Scheduler": "DDPMScheduler", "Pipeline": "DDPMPipeline"}.get(
        class_name, class_name
    )
    for value in rule.unless:
        check_keys(accepted, {key: value}, "model/config.json")
    for value in ("strange", 77, ["a"], {"a": 1}, "x" * 9999):
        with pytest.raises(Unsupported, match=rf"^model/config.json: {key} is .*Supported is") as e:
            check_keys(accepted, {key: value}, "model/config.json")
        assert len(str(e.value)) < 600


@pytest.mark.parametrize("class_name", ACCEPTED)
@pytest.mark.parametrize("value", [1, True, "on", [0], {"a": 1}, 0.5, "x" * 9999])
def test_an_unknown_key_is_refused_unless_it_is_off(class_name: str, value: Any) -> None:
    for off in (None, False):
        check_keys(class_name, {"brand_new_key": off}, "model/config.json")
    with pytest.raises(Unsupported, match=r"brand_new_key is .*, which .* does not know") as e:
        check_keys(class_name, {"brand_new_key": value}, "model/config.json")
    assert len(str(e.value)) < 600


def test_a_key_of_a_newer_diffusers_is_taken_with_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def newer(self: object, gain: float = 1.5, sides: tuple[int, ...] = (1, 2)) -> None: ...

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "__init__", newer)
    for class_name in ("UNet2DConditionModel", "LaptopUNet2DConditionModel"):
        check_keys(class_name, {"gain": 1.5, "sides": [1, 2]}, "model/config.json")
        with pytest.raises(Unsupported, match=r"gain is 2,.*diffusers has 1\.5"):
            check_keys(class_name, {"gain": 2}, "model/config.json")


def test_known_keys_are_checked_without_importing_diffusers() -> None:
    code = (
        "import sys; from laptop.models.config_keys import check_keys;"
        "check_keys('UNet2DConditionModel', {'sample_size': 8, '_class_name': 'x'}, 'f');"
        "print(sorted({'torch', 'numpy', 'diffusers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
