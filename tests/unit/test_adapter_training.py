"""An adapter beside a frozen base: what it computes, what is drawn for it, what a run keeps of it, what is refused."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses
from torch import nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import find
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.config.sections.adapter import AdapterConfig
from sora_train.config.sections.model import ModelConfig
from sora_train.errors import ConfigError, UserError
from sora_train.models.adapters.dropout import ChannelDropout, draw_dropout
from sora_train.models.adapters.factors import Factors
from sora_train.models.adapters.inject import (
    adapter_weights,
    add_adapter,
    base_alone,
    base_weights,
    first_values,
    lengths_of_base,
)
from sora_train.models.adapters.targets import PRESETS, target_modules
from sora_train.models.transformer.dit import VideoDiT
from sora_train.monitoring.metrics import read_metrics
from sora_train.tools.checkpoints.averaging import average_checkpoints
from sora_train.training.trainer import Trainer

SIZES = ModelConfig(
    num_layers=2, num_heads=2, head_dim=8, ffn_dim=24, in_channels=4, text_dim=12, freq_dim=8
)
F64 = torch.float64


class Model(nn.Module):
    """A transformer under the name that a text-to-video model has it by."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = VideoDiT(SIZES)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, scale: float = 1.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(2, 4, 3, 4, 4, dtype=F64, generator=generator)
        captions = torch.randn(2, 7, 12, dtype=F64, generator=generator)
        t = torch.tensor([[0.2] * 3, [0.9] * 3], dtype=F64)
        return self.transformer(x * scale, t, captions)


def adapted(**settings: object) -> tuple[Model, AdapterConfig]:
    cfg = AdapterConfig(rank=3, **settings)
    model = Model()
    add_adapter(model, cfg, F64)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in adapter_weights(model).items():
        values = torch.randn(parameter.shape, generator=generator, dtype=F64)
        parameter.data = values.abs() + 0.5 if "magnitude" in name else values * 0.3
    return model, cfg


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 5.0},
        {"alpha": 5.0, "rslora": True},
        {"targets": ("all_linear",)},
        {"dora": True, "alpha": 2.0, "targets": ("attention+mlp",)},
    ],
    ids=" ".join,
)
def test_the_adapter_computes_what_its_factors_make_of_the_weights(settings: dict) -> None:
    """Against a plain model whose weights are W + scale B A, by the papers' equations; outputs and gradients."""
    model, cfg = adapted(**settings)
    rank, alpha = 3, settings.get("alpha", 3.0)
    scale = alpha / rank**0.5 if settings.get("rslora") else alpha / rank
    own = dict(model.named_parameters())
    plain = Model().double()
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in adapter_weights(model).items()
    }
    weights = {name: value.detach() for name, value in base_weights(model).items()}
    for name in target_modules(plain.transformer, cfg.targets):
        path = f"transformer.{name}"
        down, up = (leaves[f"{path}.{part}.default.weight"] for part in ("lora_A", "lora_B"))
        length = leaves.get(f"{path}.lora_magnitude_vector.default.weight")
        factors = Factors(down, up, scale, length)
        weights[f"{path}.weight"] = factors.merged(weights[f"{path}.weight"])
    expected = torch.func.functional_call(plain, weights)
    found = model()
    assert float((found - expected).detach().abs().max()) < 1e-11 * float(
        expected.detach().abs().max()
    )
    if settings.get("dora"):
        # Its paper keeps the length out of the gradient (section 4.3), so the merged weight has another one.
        return
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, leaf in leaves.items():
        assert torch.allclose(own[name].grad, leaf.grad, rtol=1e-8, atol=1e-12), name
    assert all(own[name].grad is None for name in own if name not in leaves)


def test_the_base_alone_is_the_model_without_an_adapter() -> None:
    model, _ = adapted(dora=True, targets=("all_linear",))
    with base_alone(model):
        assert torch.equal(model(), Model().double()())
    assert not torch.equal(model(), Model().double()())


def test_the_first_step_computes_what_the_base_does() -> None:
    model, _ = adapted(dora=True)
    weights = adapter_weights(model)
    for name, value in first_values(model, seed=1):
        weights[name].data = value.double()
    for name, layer in lengths_of_base(model).items():
        weights[name].data = layer.weight.detach().norm(dim=1)
    assert torch.allclose(model(), Model().double()(), rtol=0, atol=1e-12)
    first, again, other = (dict(first_values(model, seed)) for seed in (1, 1, 2))
    down = next(name for name in first if ".lora_A." in name)
    assert torch.equal(first[down], again[down]) and not torch.equal(first[down], other[down])
    # Kaiming-uniform with a = sqrt(5), as peft fills it: within 1 / sqrt(inputs), and nearly reaching it.
    bound = first[down].shape[1] ** -0.5
    assert 0.8 * bound < first[down].abs().max() <= bound


# --- what is drawn ---


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=4, unique=True),
    st.floats(0.05, 0.9),
    st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_dropout_belongs_to_the_clip_and_not_to_its_batch(
    rows: list[int], rate: float, epoch: int
) -> None:
    layers = nn.ModuleList([ChannelDropout(rate, 40), ChannelDropout(rate, 24), nn.Linear(2, 2)])
    keys = [(epoch, row) for row in rows]
    draw_dropout(layers, 0, keys)
    together = [layer.mask_BD for layer in layers if isinstance(layer, ChannelDropout)]
    for place, key in enumerate(keys):
        draw_dropout(layers, 0, [key])
        for layer, masks in zip(layers, together, strict=False):
            assert torch.equal(layer.mask_BD[0], masks[place])
    draw_dropout(layers, 0, [(epoch + 1, rows[0])])
    assert not all(
        torch.equal(layer.mask_BD[0], masks[0])
        for layer, masks in zip(layers, together, strict=False)
    )
    values = torch.cat([masks.flatten() for masks in together]).unique()
    assert set(values.tolist()) <= {0.0, float(torch.tensor(1.0) / (1 - rate))}


def test_dropout_leaves_out_its_share_keeps_the_mean_and_ends_with_training() -> None:
    layer = ChannelDropout(0.25, 20_000)
    draw_dropout(nn.ModuleList([layer, nn.Linear(1, 1)]), 0, [(0, 0), (0, 1)])
    x = torch.ones(2, 3, 5, 20_000)
    y = layer(x)
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(y[:, 0, 0], y[:, 2, 4]), "one draw for all tokens of a clip"
    assert torch.equal(layer.eval()(x), x)


# --- which layers ---


def test_presets_are_the_layers_that_they_say() -> None:
    transformer = VideoDiT(SIZES)
    counts = {name: len(target_modules(transformer, (name,))) for name in PRESETS}
    # Of each of two blocks: q, k, v, out of two attentions; two more of the MLP; then the ends.
    assert counts == {"attention": 16, "attention+mlp": 20, "all_linear": 23}
    everything = target_modules(transformer, ("all_linear",))
    assert not [name for name in everything if "time" in name or "patch" in name]
    assert target_modules(transformer, ("blocks.1.attn1.to_[qk]",)) == [
        "blocks.1.attn1.to_q",
        "blocks.1.attn1.to_k",
    ]


def test_a_target_that_matches_nothing_is_told_with_what_would() -> None:
    names = "blocks.*.attn1.to_q", "blocks.*.ffn.net.2"
    with refuses(ConfigError, "adapter.targets", "'attn.qkv'", *names):
        target_modules(VideoDiT(SIZES), ("attention", "attn.qkv"))
    with refuses(ConfigError, "adapter.targets", "attention+mlp"):
        target_modules(VideoDiT(SIZES), ())


def test_a_model_without_a_transformer_is_told() -> None:
    with refuses(ConfigError, "adapter.rank=2", "transformer", "Linear"):
        add_adapter(nn.Linear(2, 2), AdapterConfig(rank=2), F64)


# --- a run ---

TINY = [
    "experiment=parity_tiny", "optim=adamw", "train.micro_batches=2", "parallel.self_test=false", "validation.every=2",
    "optim.lr=0.01", "optim.warmup_steps=0", "run.threads=1", "sample.every=0",
]  # fmt: skip
ADAPTER = [
    "adapter.rank=2",
    "adapter.dropout=0.1",
    "adapter.dora=true",
    "adapter.targets=[all_linear]",
]


def config(folder: Path, *overrides: str) -> Config:
    return compose([*TINY, f"run.dir={folder}", *overrides]).config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base of two steps, and an adapter's run of four beside it."""
    home = tmp_path_factory.mktemp("adapter")
    Trainer(config(home / "base", "train.steps=2")).train()
    Trainer(adapter_config(home, home / "straight")).train()
    yield home


def adapter_config(home: Path, folder: Path, *overrides: str) -> Config:
    return config(
        folder,
        *ADAPTER,
        f"init.run={home / 'base'}",
        "train.steps=4",
        "checkpoint.every=2",
        *overrides,
    )


def tensors_of(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    stored = StoredTensors(find(folder, step))
    return stored.read(*stored.shapes)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(home: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(home / "straight", stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-000004")
    Trainer(adapter_config(home, stopped)).train()
    one, other = tensors_of(home / "straight"), tensors_of(stopped)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [
        [row["train/loss"] for row in read_metrics(of / "metrics.jsonl")]
        for of in (home / "straight", stopped)
    ]
    assert losses[0] == losses[1]


def test_a_checkpoint_holds_the_adapter_alone_and_says_whose_it_is(home: Path) -> None:
    names = set(tensors_of(home / "straight"))
    assert names and all(".lora_" in name for name in names)
    parts = {name.split(".")[0] for name in names}
    assert parts == {"model", "optim", "ema"}
    state = find(home / "straight").state()
    assert state["digests"]["base"] == checkpoints.layout.weights_digest(find(home / "base"), "ema")
    sizes = [
        sum(p.stat().st_size for p in find(home / of).path.iterdir()) for of in ("straight", "base")
    ]
    assert sizes[0] < sizes[1] / 3


def test_beside_another_base_it_does_not_go_on(home: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(home / "straight", again)
    Trainer(config(tmp_path / "other", "train.steps=1")).train()
    elsewhere = adapter_config(home, again, f"init.run={tmp_path / 'other'}", "train.steps=5")
    with refuses(UserError, str(again), str(tmp_path / "other"), "FOLDER@STEP"):
        Trainer(elsewhere)
    # The averaged weights of the base are others than the live ones.
    live = adapter_config(home, again, "init.weights=live", "train.steps=5")
    with refuses(UserError, str(home / "base")):
        Trainer(live)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("adapter.rank=4", "adapter.rank was 2, is 4"),
        ("adapter.targets=[attention]", "adapter.targets was"),
    ],
)
def test_another_adapter_is_another_experiment(
    home: Path, tmp_path: Path, override: str, key: str
) -> None:
    again = tmp_path / "again"
    shutil.copytree(home / "straight", again)
    with refuses(ConfigError, str(again), key):
        Trainer(adapter_config(home, again, override))


def test_an_adapter_is_no_base(home: Path, tmp_path: Path) -> None:
    cfg = adapter_config(home, tmp_path / "run", f"init.run={home / 'straight'}")
    with refuses(UserError, "init.run", "sora ckpt merge", "adapter.init"):
        Trainer(cfg)


def test_a_trigger_that_no_caption_has_is_refused(home: Path, tmp_path: Path) -> None:
    cfg = adapter_config(home, tmp_path / "run", "adapter.trigger=zxcv")
    with refuses(UserError, "adapter.trigger", "zxcv", "captions"):
        Trainer(cfg)


BOTH = ["model.expert=both"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.rank=4", "init.run="], "needs a base"),
        (["adapter.rank=0", "adapter.dora=true"], "adapter.dora=True"),
        (["adapter.rank=4", "init.run=x", "init.optimizer=true"], "init.optimizer"),
        (["adapter.rank=4", "init.run=x", *BOTH], "model.expert=both"),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(["experiment=parity_tiny", *overrides])


def test_adapters_of_two_runs_are_not_averaged_factor_by_factor(home: Path, tmp_path: Path) -> None:
    one, other = find(home / "straight", 2), find(home / "straight", 4)
    average_checkpoints([one, other], (), tmp_path / "of_one_run")
    shutil.copytree(home / "straight", tmp_path / "twin")
    twin = find(tmp_path / "twin")
    with refuses(UserError, "adapters of two runs", "sora ckpt merge"):
        average_checkpoints([one, twin], (), tmp_path / "of_two")


def test_the_card_says_what_is_frozen(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(adapter_config(home, tmp_path / "run", "dry_run=true")).train()
    said = " ".join(capsys.readouterr().out.split())
    assert "DoRA of rank 2 on" in said and "frozen, its text encoder too" in said
