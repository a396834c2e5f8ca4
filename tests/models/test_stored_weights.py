"""Weights that do not fit their config are refused from headers; what stock loads whole is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from laptop.errors import BadInput
from laptop.models import loading, locating

Tensors = dict[str, Tensor]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
RESNET = "mid_block.resnets.0.conv1.weight"


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small pipeline that a test may damage."""
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


def change(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


def unfused(t: Tensors) -> None:
    t[f"{QUERY}.base_layer.weight"] = t.pop(f"{QUERY}.weight")
    t[f"{QUERY}.lora_A.default.weight"] = torch.zeros(2, 16)


def renamed(t: Tensors) -> None:
    for name in list(t):
        t[f"model.{name}"] = t.pop(name)


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        (UNET, lambda t: t.pop(RESNET), rf"1 tensors are missing: {RESNET}\."),
        (VAE, lambda t: t.pop("quant_conv.bias"), r"weights of vae/.*missing: quant_conv\.bias"),
        (TEXT, lambda t: t.popitem(), r"weights of text_encoder/.*1 tensors are missing"),
        (UNET, lambda t: t.update({RESNET: torch.zeros(3, 3)}), rf"{RESNET} is \[3, 3\], needed"),
        (UNET, lambda t: t.update({"cond_proj.weight": torch.zeros(1)}), "are no part of it: cond"),
        (UNET, lambda t: [t.update({f"x{i}": torch.zeros(1)}) for i in range(5)], "5 are no.*, …"),
        (UNET, unfused, r"2 tensors of a LoRA .*base_layer.*fuse_lora"),
        (VAE, lambda t: t.update({"x.lora.up": torch.zeros(1)}), "LoRA"),
        (TEXT, lambda t: t.update({"q_lora.down.weight": torch.zeros(1)}), "LoRA"),
        (UNET, renamed, r"tensors are missing: .* are no part"),
        (UNET, lambda t: t.update({RESNET: t[RESNET].to(torch.int8)}), r"1 tensors in I8: mid_"),
        (UNET, lambda t: t.update({RESNET: t[RESNET].to(torch.float8_e4m3fn)}), "in F8_E4M3"),
        (UNET, lambda t: t.clear(), "tensors are missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_read(
    folder: Path, file: str, edit: Callable[[Tensors], object], said: str
) -> None:
    locating.locate(str(folder))
    change(folder / file, edit)
    with pytest.raises(BadInput, match=said) as e:
        locating.locate(str(folder))
    assert len(str(e.value)) < 1200


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_component_without_weights_is_named(folder: Path, part: str) -> None:
    next((folder / part).glob("*.safetensors")).unlink()
    with pytest.raises(BadInput, match=f"the weights of {part}/ are missing"):
        locating.locate(str(folder))


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_pointer_of_git_lfs_says_how_to_fetch_the_file(folder: Path, file: str) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BadInput, match="git lfs pull"):
        locating.locate(str(folder))


def test_weights_that_are_a_link_to_nothing_are_refused(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(folder / "unet" / "gone.safetensors")
    with pytest.raises(BadInput, match="does not exist"):
        locating.locate(str(folder))


def test_a_tokenizer_without_a_length_is_refused(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(BadInput, match="has no model_max_length"):
        loading.load_encoders(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    (folder / UNET).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    locating.locate(str(folder))
    shards[1].unlink()
    with pytest.raises(BadInput, match=rf"{shards[1].name}.*missing"):
        locating.locate(str(folder))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("file", "part"), [(UNET, "unet"), (VAE, "vae"), (TEXT, "text_encoder")])
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(
    folder: Path, file: str, part: str, value: str
) -> None:
    change(folder / file, lambda t: t[max(t)].view(-1)[0].fill_(float(value)))
    with pytest.raises(BadInput, match=f"1 tensors of {part}/ hold values that are not finite"):
        loading.load_pipeline(str(folder))


@pytest.mark.parametrize(
    "changes", [{"block_out_channels": [16, 33]}, {"down_block_types": ["X", "Y"]}]
)
def test_a_config_that_diffusers_cannot_build_is_one_message(
    folder: Path, changes: dict[str, object]
) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadInput, match=r"unet/config\.json describes no network"):
        locating.locate(str(folder))


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(t: Tensors) -> None:
    """The names that attention had in diffusers before 0.18."""
    for name in [n for n in t if ".attentions." in n]:
        for new, old in OLD.items():
            if f".{new}." in name:
                t[name.replace(f".{new}.", f".{old}.")] = t.pop(name)


def with_positions(t: Tensors) -> None:
    t["text_model.embeddings.position_ids"] = torch.arange(77)[None]


def whole_clip(t: Tensors) -> None:
    t |= {
        "vision_model.x": torch.zeros(1),
        "logit_scale": torch.zeros(()),
        "text_projection.weight": torch.zeros(1),
    }


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (VAE, old_names),
        (TEXT, with_positions),
        (TEXT, whole_clip),
        (UNET, lambda t: t.update({n: v.half() for n, v in t.items()})),
        (UNET, lambda t: t.update({n: v.bfloat16() for n, v in t.items()})),
        (UNET, lambda t: t.update({n: v.double() for n, v in t.items()})),
    ],
)
def test_what_stock_libraries_load_whole_is_loaded(
    folder: Path, file: str, edit: Callable[[Tensors], object]
) -> None:
    before = load_file(folder / file)
    change(folder / file, edit)
    pipe = loading.load_pipeline(str(folder))
    part = getattr(pipe, file.split("/")[0])
    after = {name.removeprefix("text_model."): value for name, value in part.state_dict().items()}
    for name, value in before.items():
        assert torch.allclose(after[name.removeprefix("text_model.")], value, atol=1e-2), name
    stock = {VAE: AutoencoderKL, TEXT: CLIPTextModel, UNET: UNet2DConditionModel}[file]
    _, info = stock.from_pretrained(folder, subfolder=file.split("/")[0], output_loading_info=True)
    assert not info["missing_keys"], "stock loads it whole, too"


def test_a_text_encoder_without_prefix_is_taken_where_transformers_reads_it(folder: Path) -> None:
    """transformers 5 writes one so; 4 would make up every tensor of it."""

    def without_prefix(t: Tensors) -> None:
        for name in list(t):
            t[name.removeprefix("text_model.")] = t.pop(name)

    change(folder / TEXT, without_prefix)
    _, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    if not info["missing_keys"]:
        locating.locate(str(folder))
        return
    with pytest.raises(BadInput, match="tensors are missing: text_model"):
        locating.locate(str(folder))


def test_old_names_of_attention_in_an_unconditional_unet_are_loaded(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    change(tmp_path / UNET, old_names)
    assert any(".query." in name for name in load_file(tmp_path / UNET))
    loaded = loading.load_unet(str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())
