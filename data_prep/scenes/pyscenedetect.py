"""PySceneDetect's adaptive detector, the light choice: it finds cuts by differences of colour, and no dissolves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data_prep.scenes.samples import Sample
from sora_train.errors import UserError


def package() -> Any:
    """The module `scenedetect`. Raises UserError where it is missing."""
    try:
        import scenedetect
    except ImportError as error:
        raise UserError(
            "scenes.detector=pyscenedetect needs PySceneDetect; install it with `pip install 'sora_train[prep]'`, "
            "or choose scenes.detector=difference"
        ) from error
    return scenedetect


def marking(pictures: Iterable[Sample], steps: set[int]) -> Iterator[Sample]:
    """The same samples; the numbers of those before which there is a cut are added to `steps`."""
    scenedetect = package()
    # It judges each sample by two around it; a least length would let one cut hide another.
    detector = scenedetect.AdaptiveDetector(min_scene_len=0)
    for sample in pictures:
        time = scenedetect.FrameTimecode(sample.number, fps=25.0)
        found = detector.process_frame(time, np.ascontiguousarray(sample.picture[..., ::-1]))
        steps.update(cut.frame_num for cut in found)
        yield sample
