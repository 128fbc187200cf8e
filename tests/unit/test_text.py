"""The byte-level text encoder, and the model that holds it when it is trained."""

from pathlib import Path

import pytest
import torch
from sentences import refuses, says

from sora_train.cli import run as cli_run
from sora_train.config.compose import compose
from sora_train.config.sections.model import ModelConfig, TextConfig
from sora_train.errors import ConfigError
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.text_to_video import TextToVideo

SIZES = dict(d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24, max_length=48)
MODEL = ModelConfig(
    num_layers=2, num_heads=2, head_dim=12, ffn_dim=32, in_channels=4, text_dim=16, freq_dim=16
)
PROMPTS = ["a red circle moves left", "", "ein grüner Würfel"]


def build(**changes) -> TextEncoder:
    encoder = TextEncoder(TextConfig(**(SIZES | changes)))
    encoder.init_weights(0)
    return encoder


def test_tokens_are_bytes_padded_to_multiples_of_sixteen():
    encoder = build()
    ids, mask = encoder.tokenize(PROMPTS)
    assert ids.shape == mask.shape == (3, 32)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [len(p.encode()) + 1 for p in PROMPTS]
    assert ids[0, :23].tolist() == [b + 3 for b in PROMPTS[0].encode()]
    assert ids[1].tolist() == [1] + [0] * 31
    assert encoder.tokenize([""])[0].shape == (1, 16)


def test_long_captions_are_cut_and_counted():
    encoder = build()
    ids, mask = encoder.tokenize(["x" * 47, "x" * 48, "ü" * 40])
    assert ids.shape == (3, 48)
    assert ids[:, -1].tolist() == [1, 1, 1]
    assert mask.all()
    assert encoder.num_truncated == 2


@pytest.mark.parametrize("padding", ["masked", "wan"])
def test_an_embedding_does_not_depend_on_its_batch(padding):
    encoder = build(padding=padding)
    together, mask = encoder.encode(PROMPTS)
    assert (mask is None) == (padding == "wan")
    assert together.shape[1] == (48 if padding == "wan" else 32)
    for b, prompt in enumerate(PROMPTS):
        alone, _ = encoder.encode([prompt])
        size = alone.shape[1]
        torch.testing.assert_close(alone[0], together[b, :size], rtol=1e-4, atol=1e-5)
        own = len(prompt.encode()) + 1
        assert together[b, own:].abs().max() == 0 < together[b, :own].abs().min()


def test_weights_are_keyed_and_the_digest_tells_them_apart():
    frozen = build(trainable=False)
    torch.manual_seed(9)
    assert build(trainable=False).digest() == frozen.digest()
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.init_weights(1)
    assert build(trainable=False).digest() != frozen.digest()
    trainable = build()
    digest = trainable.digest()
    trainable.init_weights(1)
    assert trainable.digest() == digest != build(padding="wan").digest()


def test_heads_start_by_looking_at_their_neighbours():
    """Bucket 0 is a byte itself, 1 and 9 (of 16) its neighbours; every head's bias falls with distance."""
    encoder = build()
    table = dict(encoder.named_parameters())[
        "model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ]
    half = len(table) // 2
    for side in (table[:half], table[half:]):
        assert (side.diff(dim=0) < 0).all()
    assert (table[1] == table[half + 1]).all()


def test_initial_scales_are_those_of_transformers():
    encoder = build(d_model=64, d_kv=32, d_ff=128)
    expected = {n: p.detach().clone() for n, p in TextEncoder(encoder.cfg).named_parameters()}
    for name, param in encoder.named_parameters():
        if "shared" in name or "relative_attention_bias" in name:
            continue  # ours: see TextEncoder._initial_value
        assert param.std().item() == pytest.approx(
            expected[name].std().item(), rel=0.2, abs=1e-6
        ), name


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 4, 4, generator=g), torch.rand(3, 2, generator=g)


def build_model(**changes) -> TextToVideo:
    model = TextToVideo(MODEL, TextConfig(**(SIZES | changes)), seed=0)
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    return model


def test_a_trainable_encoder_is_part_of_the_model():
    model = build_model()
    ids, mask = model.tokenize(PROMPTS)
    got = model(*batch(), (ids, mask))
    assert torch.equal(got, model(*batch(), (model.text_encoder(ids, mask), mask)))
    got.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"transformer", "text_encoder"}
    values = dict(model.initial_values(0))
    assert values.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("padding", ["masked", "wan"])
def test_a_prediction_does_not_depend_on_the_other_captions(padding, trainable):
    model = build_model(padding=padding, trainable=trainable)
    latents, t_BT = batch()
    together = model(latents, t_BT, model.tokenize(PROMPTS))
    for b, prompt in enumerate(PROMPTS):
        alone = model(latents[b : b + 1], t_BT[b : b + 1], model.tokenize([prompt]))
        torch.testing.assert_close(alone[0], together[b], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model(latents, t_BT, model.tokenize(PROMPTS[::-1])), together)


def test_a_frozen_encoder_stays_outside_and_says_the_same():
    frozen, trainable = build_model(trainable=False), build_model()
    frozen.transformer.load_state_dict(trainable.transformer.state_dict())
    assert {n.split(".")[0] for n, _ in frozen.named_parameters()} == {"transformer"}
    got = frozen(*batch(), frozen.tokenize(PROMPTS))
    expected = trainable(*batch(), trainable.tokenize(PROMPTS))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert frozen.text_digest() == build_model(trainable=False).text_digest()
    with pytest.raises(ValueError, match="frozen"):
        frozen(*batch(), trainable.tokenize(PROMPTS))
    with pytest.raises(ValueError, match="mask"):
        frozen(*batch(), (frozen.tokenize(PROMPTS)[0], None))


def test_only_models_with_fps_proj_are_told_the_rate():
    fps_B = torch.tensor([8.0, 16.0, 24.0])
    model = build_model()
    text = model.tokenize(PROMPTS)
    assert torch.equal(model(*batch(), text, fps_B=fps_B), model(*batch(), text))
    told = TextToVideo(MODEL.model_copy(update={"fps_embed": True}), TextConfig(**SIZES))
    with pytest.raises(ValueError, match="fps"):
        told(*batch(), text)


def test_widths_must_agree():
    with refuses(ConfigError, "model.text_dim", "16", "text.d_model", "24"):
        TextToVideo(MODEL, TextConfig(**(SIZES | {"d_model": 24})))


def test_a_prompt_that_is_cut_is_told_of(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """`text.max_length` is 128 bytes there, the end mark among them."""
    prompt = "a" * 127 + "the end"
    asked = ["sample", "--ckpt", str(finished_run), "--steps", "1", "--out", str(tmp_path)]
    assert cli_run([*asked, "--prompt", prompt, "--prompt", "a" * 127]) == 0
    said = capsys.readouterr().err
    says(said, "135 bytes", "reads 128", "lost is 'the end'")
    assert said.count("text.max_length") == 1


def test_recipes_for_clips_of_ones_own_read_captions_of_sentences():
    """Those that read bytes: a line of 80 letters is no caption yet."""
    assert compose(["experiment=real_tiny", "data.source=clips"]).config.text.max_length >= 512
    assert compose(["text=bytes_small"]).config.text.max_length >= 512
