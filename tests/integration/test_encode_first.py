"""`memory.encode_first`: everything is encoded before the transformer is there, and training is what it is without."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sora_train.errors import ConfigError, UserError
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.metrics import read_metrics
from sora_train.training import components
from sora_train.training.trainer import Trainer

WANTED = [
    "train.steps=4", "validation.every=0", "data.cache=latents", "text.trainable=false",
    "objective.conditioning={}", "validation.kinds=[]",
]  # fmt: skip


def losses(cfg: object) -> list[float]:
    return [row["train/loss"] for row in read_metrics(Path(cfg.run.dir) / "metrics.jsonl")]


def test_encoders_work_before_the_engine_and_never_after(
    parity_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions that are dropped too: the embedding of the empty one is kept."""
    events: list[str] = []

    def noted(owner: object, name: str, event: str) -> None:
        plain = getattr(owner, name)

        def run(*args: object, **kwargs: object) -> object:
            events.append(event)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    plain = parity_config(*WANTED, name="plain")
    Trainer(plain).train()
    noted(VideoVAE, "_posterior", "vae")
    noted(TextEncoder, "forward", "text")
    noted(components, "build_engine", "engine")
    noted(components, "release_encoders", "release")
    cfg = parity_config(*WANTED, "memory.encode_first=true", name="first")
    Trainer(cfg).train()
    placed = events.index("engine")
    assert {"vae", "text", "release"} <= set(events[:placed]) and events[placed + 1 :] == []
    assert losses(cfg) == losses(plain)


def test_a_cache_without_room_for_the_captions_is_refused(parity_config: Callable) -> None:
    cfg = parity_config(*WANTED, "memory.encode_first=true", "data.cache_text_gb=0")
    with pytest.raises(UserError, match=r"data\.cache_text_gb"):
        Trainer(cfg)


@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        (["data.cache=auto"], "data.cache=auto"),
        (
            ["data.caption_field_dropout=0.5", "data.caption_weights={short: 1}"],
            "data.caption_field_dropout=0.5",
        ),
    ],
)
def test_what_cannot_be_encoded_beforehand_is_one_sentence(
    parity_config: Callable, wanted: list[str], key: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parity_config(*WANTED, "memory.encode_first=true", *wanted)
    assert key in str(error.value) and "memory.encode_first=true" in str(error.value)
