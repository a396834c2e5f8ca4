"""The documented configurations of accelerate's launcher are ones that it reads."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parent.parent / "docs" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_documented_configuration_is_one_that_accelerate_knows(path: Path) -> None:
    config = load_config_from_file(str(path))
    for key, value in yaml.safe_load(path.read_text()).items():
        found = getattr(config, key)
        assert str(getattr(found, "value", found)).upper() == str(value).upper() or found == value


def test_the_training_guide_names_each_of_them() -> None:
    text = (FOLDER.parent / "guides" / "distill.md").read_text()
    assert CONFIGS
    assert all(path.name in text for path in CONFIGS)
