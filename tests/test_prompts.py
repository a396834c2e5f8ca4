"""The prompts that ship with the package."""

import re

import pytest

from laptop.errors import BadInput
from laptop.prompts import (
    GENERAL,
    calibration_prompts,
    evaluation_prompts,
    read_prompts,
    training_prompts,
)  # fmt: skip

PROMPTS = read_prompts(GENERAL)


def words(prompt: str) -> list[str]:
    return re.findall(r"[\w'-]+|[^\w\s]", prompt)


def test_there_are_three_hundred_prompts_and_no_two_alike() -> None:
    assert len(PROMPTS) >= 300
    assert len({prompt.lower().strip(" .") for prompt in PROMPTS}) == len(PROMPTS)


def test_prompts_are_short_and_long_and_begin_in_many_ways() -> None:
    lengths = [len(words(prompt)) for prompt in PROMPTS]
    assert min(lengths) <= 4
    assert max(lengths) >= 25
    assert len({tuple(prompt.split()[:3]) for prompt in PROMPTS}) > 0.8 * len(PROMPTS)


def test_no_prompt_is_cut_off_by_clips_77_tokens() -> None:
    """Words and marks for tokens: of these CLIP makes some 1.3 tokens each, and two of its own."""
    assert max(len(words(prompt)) for prompt in PROMPTS) <= 45


def test_prompts_are_plain_text_that_any_tokenizer_reads() -> None:
    for prompt in PROMPTS:
        assert prompt == " ".join(prompt.split())
        assert re.fullmatch(r"[\w ,.:'-]+", prompt), prompt


def test_a_model_that_draws_anything_is_judged_by_what_it_was_not_trained_on(monkeypatch) -> None:
    monkeypatch.setattr("laptop.prompts.draws_scenes", lambda model: False)
    trained, judged = training_prompts(), evaluation_prompts("sdxl", 500)
    assert len(trained) >= 300
    assert len(judged) >= 100
    assert trained + judged == PROMPTS
    assert calibration_prompts("sdxl", 32) == PROMPTS[:32]


def test_prompts_begin_anew_when_more_are_asked_than_there_are(tmp_path) -> None:
    file = tmp_path / "two.txt"
    file.write_text("a\n\n b \n")
    assert calibration_prompts("tiny-sdxl", 5, file) == ["a", "b", "a", "b", "a"]
    file.write_text("\n")
    with pytest.raises(BadInput, match="holds no prompt"):
        read_prompts(file)
