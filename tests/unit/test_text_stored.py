"""Published text encoders: small random models of the real classes and a small real tokenizer,
stored by transformers and loaded through the real path."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from pydantic import ValidationError
from sentences import refuses, says
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sora_train.config.sections.model import ModelConfig, TextConfig
from sora_train.errors import ConfigError, UserError
from sora_train.models.text.lengths import CaptionLengths
from sora_train.models.text.published import StoredTextEncoder, build_text_encoder
from sora_train.models.text_to_video import TextToVideo

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "moves",
    "left",
    "right",
    "up",
    "&",
    "down",
    "slowly",
]
PROMPTS = ["a red circle moves left", "", "a  blue\n square &amp; a circle moves up slowly"]
T5 = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
CLIP = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=21,
    bos_token_id=3,
    eos_token_id=1,
    pad_token_id=0,
)
KINDS = {
    "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
}


def tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Words as tokens and an end mark, with CLIP's start mark."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<s>": 3}
    vocabulary |= {word: 4 + i for i, word in enumerate(WORDS)}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = "<s> " if kind == "clip" else ""
    built.post_processor = processors.TemplateProcessing(
        single=f"{start}$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def stored(kind: str, folder: Path) -> torch.nn.Module:
    """A pipeline's folder with a random model and its tokenizer."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        assert parameter.isfinite().all(), name
    model.save_pretrained(folder / "text_encoder")
    tokenizer(kind).save_pretrained(folder / "tokenizer")
    return model


def config(kind: str, folder: Path, **changes) -> TextConfig:
    length = 21 if kind == "clip" else 32
    values = dict(kind=kind, path=str(folder), trainable=False, d_model=16, max_length=length)
    return TextConfig(**(values | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_models_own(kind, tmp_path):
    theirs = stored(kind, tmp_path)
    encoder = build_text_encoder(config(kind, tmp_path))
    assert isinstance(encoder, StoredTextEncoder)
    assert not any(p.requires_grad for p in encoder.parameters())
    captions, mask = encoder.encode(PROMPTS)
    assert mask is not None
    assert captions.shape[1] == 16
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(kind)([encoder.kind.clean(prompt)], return_tensors="pt").input_ids
        with torch.no_grad():
            alone = theirs(input_ids=ids).last_hidden_state[0]
        assert mask[row].sum() == len(alone)
        torch.testing.assert_close(captions[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert (captions[row, len(alone) :] == 0).all()
        one = encoder.embedding(prompt)
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)


def test_wan_padding_is_what_wans_pipeline_makes(tmp_path):
    from diffusers import WanPipeline

    theirs = stored("umt5", tmp_path)
    encoder = build_text_encoder(config("umt5", tmp_path, padding="wan"))
    prompts = [*PROMPTS, "a red circle " * 20]
    pipeline = SimpleNamespace(tokenizer=tokenizer("umt5"), text_encoder=theirs)
    with torch.no_grad():
        expected = WanPipeline._get_t5_prompt_embeds(
            pipeline, prompts, max_sequence_length=32, device=torch.device("cpu")
        )
        captions, mask = encoder.encode(prompts)
    assert mask is None
    assert captions.shape == expected.shape == (4, 32, 16)
    torch.testing.assert_close(captions, expected, rtol=1e-4, atol=1e-5)
    assert (captions[0, 6:] == 0).all()
    assert encoder.num_truncated == 1
    rows = [encoder.embedding(prompt) for prompt in prompts]
    torch.testing.assert_close(encoder.batched(rows)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_caption_is_cut_keeps_its_end_mark_and_is_counted(kind, tmp_path):
    stored(kind, tmp_path)
    encoder = build_text_encoder(config(kind, tmp_path))
    limit = encoder.cfg.max_length
    marks = 2 if kind == "clip" else 1
    ids, mask = encoder.tokenize(["a " * (limit - marks), "a " * (limit - marks + 1)])
    assert ids.shape == (2, limit)
    assert ids[:, -1].tolist() == [1, 1]
    assert mask.all()
    assert encoder.num_truncated == 1


@pytest.mark.parametrize("kind", [*KINDS, "umt5_bytes"])
def test_what_a_cut_loses_is_told(kind: str, tmp_path: Path):
    """Words are tokens of these encoders, bytes of ours; what is kept is read alike without the rest."""
    if kind == "umt5_bytes":
        cfg, kept, lost, length = TextConfig(max_length=16), "é" * 7 + "a", "left up", 15 + 7 + 1
    else:
        stored(kind, tmp_path)
        cfg = config(kind, tmp_path)
        marks = 2 if kind == "clip" else 1
        words = cfg.max_length - marks
        kept, lost, length = "a " * words, "left up down", words + 3 + marks
    lengths, encoder = CaptionLengths(cfg), build_text_encoder(cfg)
    assert lengths.of([kept + lost, kept, ""]).tolist() == [
        length, cfg.max_length, int(encoder.tokenize([""])[1].sum()),
    ]  # fmt: skip
    assert (lengths.lost(kept + lost), lengths.lost(kept), lengths.lost("")) == (lost, "", "")
    assert torch.equal(encoder.tokenize([kept + lost])[0], encoder.tokenize([kept])[0])
    (note,) = lengths.cut_notes([kept + lost, kept, kept + lost])
    unit = "bytes" if kind == "umt5_bytes" else "tokens"
    says(note, f"{length} {unit}", f"reads {cfg.max_length}", "text.max_length", f"'{lost}'")
    says(lengths.share_cut([kept + lost, kept, "", ""]), "25 %", "1 of 4", f"{length} {unit}")


def test_captions_of_an_encoder_that_is_not_here_are_not_counted(tmp_path: Path):
    lengths = CaptionLengths(config("t5", tmp_path / "nowhere"))
    says(lengths.share_cut(["a"]), "not counted", "text.path", "nowhere")


def test_a_model_takes_a_stored_encoder_and_leaves_its_weights(tmp_path):
    theirs = stored("umt5", tmp_path)
    text = config("umt5", tmp_path)
    sizes = dict(num_layers=1, num_heads=2, head_dim=12, ffn_dim=32, in_channels=4, freq_dim=16)
    model = TextToVideo(ModelConfig(**sizes, text_dim=16), text, seed=3)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"transformer"}
    weights = dict(theirs.named_parameters())
    for name, value in model.frozen_encoder.model.named_parameters():
        assert torch.equal(value, weights[name]), name
    captions, mask = model.tokenize(PROMPTS)
    out = model(torch.randn(3, 4, 1, 4, 4), torch.rand(3, 1), (captions, mask))
    assert out.shape == (3, 4, 1, 4, 4)
    model.tokenize(["a " * 40])
    assert (model.take_truncated(), model.take_truncated()) == (1, 0)


def test_the_digest_tells_weights_padding_precision_and_vocabulary_apart(tmp_path):
    stored("t5", tmp_path)

    def digest(**changes) -> str:
        return build_text_encoder(config("t5", tmp_path, **changes)).digest()

    digests = [digest(), digest(padding="wan"), digest(dtype="bfloat16"), digest(max_length=48)]
    assert digest() == digests[0]
    changed = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(changed))
    digests.append(digest())
    stored("t5", tmp_path)
    model = transformers.T5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    with torch.no_grad():
        model.shared.weight[7, 3] += 1
    model.save_pretrained(tmp_path / "text_encoder")
    digests.append(digest())
    assert len(set(digests)) == 6


def test_bfloat16_computes_coarsely_and_gives_float32(tmp_path):
    stored("umt5", tmp_path)
    fine = build_text_encoder(config("umt5", tmp_path)).encode(PROMPTS)[0]
    coarse = build_text_encoder(config("umt5", tmp_path, dtype="bfloat16")).encode(PROMPTS)[0]
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - fine).abs().max() < 0.2


def test_what_cannot_be_used_is_told_in_a_sentence(tmp_path):
    with refuses(UserError, "text.path", "nowhere", "config.json"):
        build_text_encoder(config("t5", tmp_path / "nowhere"))
    stored("t5", tmp_path)
    with refuses(UserError, "type t5", "text.kind=umt5"):
        build_text_encoder(config("umt5", tmp_path))
    with refuses(ConfigError, "text.d_model", "24", "text.d_model=16"):
        build_text_encoder(config("t5", tmp_path, d_model=24))
    weights = tmp_path / "text_encoder/model.safetensors"
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path / "text_encoder").state_dict()
    loaded.pop("encoder.final_layer_norm.weight")
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in loaded.items()}, weights, metadata={"format": "pt"})
    with refuses(UserError, "misses 1", "encoder.final_layer_norm.weight"):
        build_text_encoder(config("t5", tmp_path))
    weights.unlink()
    with refuses(UserError, "text.path", "cannot be read", "safetensors"):
        build_text_encoder(config("t5", tmp_path))
    stored("clip", tmp_path)
    with refuses(ConfigError, "22", "text.max_length=21"):
        build_text_encoder(config("clip", tmp_path, max_length=22))
    for path in (tmp_path / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer"):
        build_text_encoder(config("clip", tmp_path))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"kind": "t5"}, ("text.path", "empty")),
        ({"path": "somewhere"}, ("umt5, t5 or clip",)),
        ({"kind": "clip", "path": "somewhere"}, ("text.trainable=false",)),
        ({"max_length": 77}, ("multiple of 16",)),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, facts):
    with refuses(ValidationError, *facts):
        TextConfig(**changes)
