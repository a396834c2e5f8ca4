"""One step of distillation: what it logs, and that it is the same however it is computed."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from laptop.distill import session as sessions
from laptop.distill.batches import Batch, ZeroBatches
from laptop.distill.features import Features, module_pairs
from laptop.distill.forecast import activation_bytes
from laptop.distill.optimizer import learning_rate
from laptop.distill.session import Session
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.distill.trainer import Training, start
from laptop.errors import BadInput, MissingExtra
from laptop.models import loading, locating
from laptop.pruning.noising import Noising
from laptop.pruning.surgery import prune_unet
from laptop.pruning.units import example_inputs

CONFIG = DistillConfig(steps=6, batch_size=4, warmup_steps=2)
TRAIN = TrainConfig(checkpoint_every=2)


@pytest.fixture
def make(pair, pair_cache):
    """A session with changed settings, of either config."""

    def made(**changes: object) -> Session:
        configs = []
        for config in (CONFIG, TRAIN):
            own = {k: v for k, v in changes.items() if hasattr(config, k)}
            configs.append(replace(config, **own))
        return start(Training(*pair, pair_cache, *configs))

    return made


def gradients(session: Session) -> dict[str, torch.Tensor]:
    """The gradients of the first step."""
    kept = {}

    def keep(parameters, _norm):
        kept.update({n: p.grad.clone() for n, p in session.raw.named_parameters()})
        return torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    session.accelerator.clip_grad_norm_ = keep
    session.step(0)
    return kept


def test_every_term_weight_norm_and_share_is_logged(make) -> None:
    line = make().step(0)
    modules = set(line.features)
    assert modules >= {"down_blocks.0", "mid_block", "up_blocks.1"}
    assert set(line.alphas) == set(line.norms) == modules
    assert set(line.gradient_norms) == {"task", "output", *modules}
    assert line.loss == pytest.approx(line.task + line.output + line.feature, rel=1e-5)
    assert line.feature == pytest.approx(sum(line.features.values()), rel=1e-5)
    for module in modules:
        assert line.alphas[module] == pytest.approx(1 / line.norms[module] ** 2, rel=1e-4)


def test_a_logged_norm_is_that_of_the_gradient_that_the_term_alone_gives(make) -> None:
    line = make().step(0)
    alone = gradients(make(task_weight=0.0, feature_weight=0.0))
    norm = torch.stack([g.square().sum() for g in alone.values()]).sum().sqrt()
    assert line.gradient_norms["output"] == pytest.approx(float(norm), rel=1e-4)


def test_micro_batches_and_checkpointing_give_the_gradients_of_the_whole_batch(make) -> None:
    """With norms of a calibration; those of a batch are those of the micro-batch."""
    whole = gradients(make(norms="calibration"))
    for change in ({"micro_batch": 1}, {"micro_batch": 3}, {"gradient_checkpointing": True}):
        other = gradients(make(norms="calibration", **change))
        for name, value in whole.items():
            scale = float(value.abs().max()) + 1e-6
            assert float((other[name] - value).abs().max()) < 1e-3 * scale, (change, name)


@pytest.mark.parametrize("setting", ["blocks", "attentions", "layers"])
def test_features_pair_where_the_student_still_has_the_layer(setting, pair, make) -> None:
    teacher, student = map(loading.load_unet, pair)
    modules = module_pairs(teacher, student, setting)
    if setting == "layers":
        assert "down_blocks.0.resnets.0" in modules
        assert "down_blocks.1.resnets.0" not in modules, "it was removed"
    if setting == "attentions":
        assert all(name.endswith("attn1") for name in modules)
        removed = "up_blocks.1.attentions.1.transformer_blocks.0"
        assert not any(name.startswith(removed) for name in modules)
    line = make(features=setting).step(0)
    assert list(line.features) == list(modules)


def test_a_forward_that_is_computed_again_leaves_no_maps(pruned_folder) -> None:
    unet = loading.load_unet(str(pruned_folder)).train()
    unet.enable_gradient_checkpointing()
    features = Features(unet, {"a": "up_blocks.2.resnets.0"})
    inputs = example_inputs(unet.config, 8)
    added = {k: torch.rand(v.shape) for k, v in inputs.pop("added_cond_kwargs").items()}
    inputs = {k: torch.rand(v.shape) for k, v in inputs.items()}
    features.collect()
    output = unet(**inputs, added_cond_kwargs=added).sample
    features.take()["a"].square().mean().backward(retain_graph=True)
    output.mean().backward()
    assert features._maps is None


def test_half_precision_is_the_teacher_s_own_and_the_student_s_by_autocast(make) -> None:
    whole, half = make(), make(mixed_precision="bf16")
    assert half.teacher.dtype == torch.bfloat16
    assert {p.dtype for p in half.raw.parameters()} == {torch.float32}
    assert half.step(0).loss == pytest.approx(whole.step(0).loss, rel=0.05)


def test_fp16_needs_a_gpu(make) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU fp16 is taken")
    with pytest.raises(BadInput, match="'fp16' needs a GPU"):
        make(mixed_precision="fp16")


def test_snr_weighting_changes_the_task_and_output_terms(make) -> None:
    plain, weighed = make().step(0), make(snr_gamma=5.0).step(0)
    assert weighed.task != pytest.approx(plain.task, rel=1e-3)
    assert weighed.feature == pytest.approx(plain.feature, rel=1e-6)


def test_without_an_average_the_weights_themselves_are_the_result(make) -> None:
    session = make(ema_decay=0.0)
    session.step(0)
    held = dict(session.raw.named_parameters())
    assert all(torch.equal(v, held[k]) for k, v in session.result().items())


def test_the_average_lags_behind(make) -> None:
    session = make()
    before = [w.clone() for w in session.average.weights]
    session.step(0)
    now, decay = list(session.raw.parameters()), 1 - 2**-0.75
    for old, average, weight in zip(before, session.average.weights, now, strict=True):
        assert torch.allclose(average, decay * old + (1 - decay) * weight, atol=1e-6)


def test_learning_rates_warm_up_and_then_follow_their_schedule() -> None:
    settings = {"peak": 2.0, "warmup": 4, "steps": 12}
    cosine = [learning_rate(i, schedule="cosine", **settings) for i in range(13)]
    assert cosine[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert cosine[8] == pytest.approx(1.0)
    assert cosine[12] == pytest.approx(0.0)
    assert learning_rate(11, schedule="constant", **settings) == 2.0


def test_the_8_bit_optimizer_names_its_extra_where_it_is_missing(make, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtra, match=r"laptop-diff\[adam8bit\]"):
        make(optimizer="adamw-8bit")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forecast_counts_what_autograd_keeps(tiny_folder, checkpointing) -> None:
    """On the meta device as on the CPU, within 2 %."""
    unet = loading.load_unet(str(tiny_folder)).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    own, kept = {p.data_ptr() for p in unet.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = example_inputs(unet.config, 16)
    inputs["added_cond_kwargs"] = {
        k: torch.rand(v.shape) for k, v in inputs["added_cond_kwargs"].items()
    }
    inputs = {k: torch.rand(v.shape) if hasattr(v, "shape") else v for k, v in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(**inputs)
    real = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    empty = loading.empty_unet(str(tiny_folder))
    assert activation_bytes(empty, 16, checkpointing) == pytest.approx(real, rel=0.02)


def test_a_calibration_is_of_the_first_batches(make, monkeypatch) -> None:
    monkeypatch.setattr(sessions, "CALIBRATION_STEPS", 1)
    fixed, fresh = make(norms="calibration"), make()
    assert fixed.step(0).norms == pytest.approx(fresh.step(0).norms, rel=1e-5)
    assert fixed.step(1).norms == fixed.step(2).norms


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the CPU")
@pytest.mark.filterwarnings("ignore")  # torch.compile's own, which would stop it
def test_teacher_and_student_get_the_guidance_that_they_learnt(tiny_folder) -> None:
    config = locating.unet_config(str(tiny_folder)) | {"time_cond_proj_dim": 8}
    teacher = UNet2DConditionModel.from_config(config)
    student = prune_unet(teacher, ["up_blocks.0.resnets.0"])
    (batch,) = ZeroBatches(config, tokens=3, batch_size=2, micro_batch=2)(0)
    guidance = torch.randn(2, 8)
    batch.conditions["timestep_cond"] = guidance
    seen = []
    for unet in (teacher, student):
        unet.register_forward_pre_hook(
            lambda _unet, _args, kwargs: seen.append(kwargs["timestep_cond"]), with_kwargs=True
        )
    noising = Noising(DDPMScheduler().config)
    Session(teacher, student, noising, lambda _step: [batch], CONFIG, TRAIN).step(0)
    assert len(seen) == 2
    assert all(torch.equal(value, guidance) for value in seen)


def test_a_compiled_step_gives_the_same_losses() -> None:
    """On a U-Net of one level, for half a minute of compiling at most."""
    torch.manual_seed(0)
    teacher = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    )
    pruned = prune_unet(teacher, ["up_blocks.0.resnets.0"])
    latents, noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    batch = Batch(
        latents, noise, torch.tensor([10, 900]), {"encoder_hidden_states": text}, ["a", "b"]
    )
    losses = {}
    for is_compiled in (False, True):
        unets, train_config = copy.deepcopy((teacher, pruned)), replace(TRAIN, compile=is_compiled)
        noising = Noising(DDPMScheduler().config)
        session = Session(*unets, noising, lambda _step: [batch], CONFIG, train_config)
        losses[is_compiled] = [session.step(i).loss for i in range(4)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
