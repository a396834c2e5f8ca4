"""The table `[sampling]`: its ranges, its schedulers, what goes over what, and its file."""

import json

import pytest

from laptop import recipe
from laptop.errors import BadInput
from laptop.pruning import sampling_config
from laptop.pruning.sampling_config import SamplingConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"steps is 0; it must be at least 1"),
        ({"steps": 10**6}, r"steps is 1000000"),
        ({"guidance": -1.0}, r"guidance is -1.0; it must be at least 0"),
        ({"guidance": float("nan")}, r"guidance is nan"),
        ({"height": 7}, r"height is 7"),
        ({"width": 10**9}, r"width is 1000000000"),
        ({"scheduler": "os.system"}, r"scheduler is 'os.system'; known are DDIMScheduler, .*LCM"),
        ({"scheduler_options": {"prediction_type": "sample"}}, r"prediction_type, which says what"),
        ({"scheduler_options": {"solver_order": 10**9}}, r"needed is a word"),
        ({"scheduler_options": {"rho": [1]}}, r"rho' is \[1\]; needed is a word"),
        ({"scheduler_options": 3}, r"scheduler_options is 3; it must be a table"),
        ({"step": 3}, r"'step' is unknown; known are guidance, height"),
        ({"steps": True}, r"steps is True; it must be a whole number"),
    ],
)
def test_a_recipe_with_a_wrong_value_is_refused_by_name(values, message) -> None:
    with pytest.raises(BadInput, match=message):
        recipe.changed(recipe.Recipe(), {"sampling": values}, "recipe.toml")


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": "4"},
        {"steps": 1.5},
        {"guidance": [1]},
        {"guidance": True},
        {"scheduler": "subprocess.Popen"},
        {"scheduler": 3},
        {"scheduler_options": "x"},
        {"scheduler_options": {"num_train_timesteps": 9}},
        {"height": -8},
        {"other": 1},
    ],
)
def test_a_folders_file_with_a_wrong_value_is_refused_and_named(values, tmp_path) -> None:
    path = tmp_path / sampling_config.FILE
    path.write_text(json.dumps({"schema": sampling_config.SCHEMA, **values}))
    with pytest.raises(BadInput, match=sampling_config.FILE):
        sampling_config.read_file(path)


def test_what_is_stated_is_written_and_read_back(tmp_path) -> None:
    config = SamplingConfig(1, 0.0, "LCMScheduler", {"original_inference_steps": 4}, width=64)
    sampling_config.write_file(tmp_path, config)
    assert sampling_config.read_file(tmp_path / sampling_config.FILE) == config
    sampling_config.write_file(tmp_path / "none", SamplingConfig())
    assert not (tmp_path / "none").exists()


def test_settings_go_over_others_key_by_key_and_options_with_their_scheduler() -> None:
    model = SamplingConfig(4, 1.0, "TCDScheduler", {"timestep_spacing": "trailing"}, 64, 64)
    assert SamplingConfig(guidance=0.0).over(model) == SamplingConfig(
        4, 0.0, "TCDScheduler", {"timestep_spacing": "trailing"}, 64, 64
    )
    assert SamplingConfig(scheduler="DDIMScheduler").over(model).scheduler_options == {}
    changed = SamplingConfig(scheduler_options={"steps_offset": 1}).over(model)
    assert changed.scheduler_options == {"timestep_spacing": "trailing", "steps_offset": 1}
