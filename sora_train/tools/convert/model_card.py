"""The model card of an exported pipeline, and in what its sampling differs from ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_train.sampling.api import CheckpointInfo


def departures(info: CheckpointInfo, scheduler: Mapping[str, Any]) -> list[str]:
    """In what the pipeline's sampling is not that of `sora sample` on this run, a sentence each."""
    spec, shape = info.spec, info.shape
    unipc = scheduler["grid"] == "unipc"
    steps = (spec.solver, spec.time_grid, spec.time_rounding)
    same = ("unipc", "unipc", "truncate") if unipc else ("euler", "flow_match_euler", "none")
    notes = []
    if steps != same:
        notes.append(
            f"differs: it samples with objective.solver={steps[0]}, time_grid={steps[1]}, time_rounding={steps[2]}, "
            f"but {scheduler['class']} as {same[0]}, {same[1]}, {same[2]}, so its clips are a little different"
        )
    if spec.shift_rule != "constant":
        notes.append(
            f"differs: objective.shift_rule={spec.shift_rule} gives each size its own shift; the scheduler has that of "
            f"{shape.frames} frames of {shape.width}x{shape.height}, {scheduler['shift']:g}"
        )
    plain = {
        "condition_scale": 1.0,
        "guidance_from": 0.0,
        "guidance_to": 1.0,
        "guidance_rescale": 0.0,
    }
    notes += [
        f"differs: WanPipeline has no objective.{key}, which is {getattr(spec, key):g} here"
        for key, value in plain.items()
        if getattr(spec, key) != value
    ]
    return notes


def _captions_cut(info: CheckpointInfo) -> str:
    """The share of captions that training cut there, as the end of a sentence; nothing where it is not known."""
    state = info.checkpoint.state()
    seen, cut = state.get("samples_seen", 0), state.get("captions_cut", 0)
    return f"; {100 * cut / seen:.3g} % of the captions trained were longer and cut" if seen else ""


def model_card(
    info: CheckpointInfo,
    run: Path,
    weights: str,
    fps: float | None,
    scheduler: Mapping[str, Any],
    notes: list[str],
    pipeline: str,
) -> str:
    """README.md of the folder; `pipeline` is the class that loads it."""
    cfg, spec, shape = info.cfg, info.spec, info.shape
    kind = {"ema": "averaged", "live": "live"}.get(weights, f"averaged ({weights})")
    sources = ", ".join(source.source for source in cfg.data.sources) or cfg.data.source
    sampler = f"{scheduler['class']}, shift {scheduler['shift']:g}, {spec.num_steps} steps"
    departed = "\n".join(f"- {note}" for note in notes)
    takes_image = pipeline == "WanImageToVideoPipeline"
    given = "image=first, last_image=last, " if cfg.model.image_pair else "image=first, "
    given = given if takes_image else ""
    low = f", guidance_scale_2={spec.guidance_scale_2:g}" if spec.guidance_scale_2 else ""
    rate = f"\nThe frame rate {fps:g} is folded into the weights.\n" if fps is not None else "\n"
    return f"""---
library_name: diffusers
pipeline_tag: {"image-to-video" if takes_image else "text-to-video"}
license: other
---

# {cfg.name}

A {"image" if takes_image else "text"}-to-video model trained with sora_train: step {info.checkpoint.step}, {kind}
weights.

| | |
|---|---|
| base | {cfg.text.path or "trained from scratch"} (text encoder), {cfg.vae.path or "random"} (VAE) |
| data | {sources} |
| usual clip | {shape.frames} frames of {shape.width}x{shape.height} at {shape.fps:g} a second |
| sampler | {sampler}, guidance {spec.guidance_scale:g} |
| longest caption | {cfg.text.max_length} tokens (`max_sequence_length`){_captions_cut(info)} |
{rate}
{departed}

Licences: those of the data, of the VAE and of the text encoder hold; fill in your own before you publish.

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{run.name}")
video = pipeline(
    {given}prompt="...", height={shape.height}, width={shape.width}, num_frames={shape.frames},
    num_inference_steps={spec.num_steps}, guidance_scale={spec.guidance_scale:g}{low},
    max_sequence_length={cfg.text.max_length},
).frames[0]
```
"""
