"""What is minimised: `Objective` says what a loss is made of, one file each for text to video and the autoencoder."""

from sora_train.base.moved_modules import refuse_renamed
from sora_train.objectives.base import LossTerm, Objective, SampleInfo
from sora_train.objectives.clips import placeholder, stored_text, to_pixels
from sora_train.objectives.consistency import ConsistencyObjective, Teacher
from sora_train.objectives.flow_batch import FlowBatch
from sora_train.objectives.sample_draws import SampleDraws
from sora_train.objectives.text_to_video import ConditionedLatents, TextToVideoObjective
from sora_train.objectives.vae import VaeObjective

__all__ = [
    "ConditionedLatents",
    "ConsistencyObjective",
    "FlowBatch",
    "LossTerm",
    "Objective",
    "SampleDraws",
    "SampleInfo",
    "Teacher",
    "TextToVideoObjective",
    "VaeObjective",
    "placeholder",
    "stored_text",
    "to_pixels",
]


def __getattr__(name: str) -> object:
    """Raises RenamedNameError for a name of earlier versions, AttributeError for any other."""
    refuse_renamed(f"objectives.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
