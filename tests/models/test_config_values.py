"""Values of a wrong kind or an absurd size in a model's configs are refused before any allocation.

Every place of the configs of the embedded model gets some twenty wrong values in turn.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from laptop.errors import BadInput
from laptop.models.model_checks import check_configs
from support.garbage import accepted

TINY = Path(__file__).parents[2] / "toolchain" / "tiny" / "model"
FILES = {str(p.relative_to(TINY)): json.loads(p.read_bytes()) for p in TINY.rglob("*.json")}
INDEX = FILES["model_index.json"]
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
TEXT, TOKENS = "text_encoder_2/config.json", "tokenizer/tokenizer_config.json"
ABSURD = re.compile(r"= (nan|inf|1e400|10{30}|-1e\+308|x{39}|\[\[\[\]\]\]|'a.x00b')$")
NOT_READ = re.compile(
    r"_diffusers_version|transformers_version|class_embeddings_concat|architectures"
)
INITIAL = re.compile("dtype|initializer_|model_type")  # of a network before it was trained


def check(changed: dict[str, Any]) -> None:
    configs = FILES | changed
    check_configs(INDEX, lambda path: copy.deepcopy(configs.get(path)), "the model")


@pytest.mark.parametrize("name", [UNET, "vae/config.json", SCHEDULER, TEXT, TOKENS])
def test_no_absurd_value_of_a_config_is_accepted(name: str) -> None:
    taken = accepted(FILES[name], lambda content: check({name: content}))
    read = {t for t in taken if not NOT_READ.match(t) and not INITIAL.match(t)}
    assert not {t for t in read if ABSURD.search(t)}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (UNET, "block_out_channels", [10**9] * 3),
        (UNET, "block_out_channels", [8] * 1000),
        (UNET, "layers_per_block", 10**6),
        (UNET, "transformer_layers_per_block", [100, [100] * 16, 100]),
        (UNET, "sample_size", 10**9),
        (UNET, "sample_size", -8),
        (UNET, "sample_size", [8, 8, 8]),
        (UNET, "sample_size", True),
        (UNET, "attention_head_dim", 0),
        (UNET, "norm_num_groups", 0),
        (SCHEDULER, "num_train_timesteps", 10**12),
        (SCHEDULER, "trained_betas", [0.1, 0.2]),
        (TEXT, "num_hidden_layers", 10**6),
        (TEXT, "vocab_size", 10**12),
    ],
)
def test_sizes_are_bounded_before_anything_is_built(name: str, key: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"{name}.*{key.split('_')[0]}"):
        check({name: FILES[name] | {key: value}})


def test_numbers_of_tokens_are_bounded() -> None:
    with pytest.raises(BadInput, match=r"vocab.json: \['x'\] is -1"):
        check({"tokenizer/vocab.json": {"x": -1}})
