"""How well a model of the shapes world paints with fewer passes through the transformer, by the oracle's scores.

    sora bench few-steps runs/quickstart --distilled runs/quickstart-distilled --prompts 256

Every row paints the same prompts (seen combinations) from the same noise, so differences are those of the sampler or of
the weights alone. Seconds are CPU time of this process for the latents, without decoding, so that neighbours on the
machine count little; the first row is measured once more at the end, which tells how far they can be trusted.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_train.base.code_version import commit, cpu_model
from sora_train.base.files import write_atomically
from sora_train.data.shapes.oracle import score
from sora_train.data.shapes.scene import Prompt
from sora_train.data.shapes.world import eval_prompts
from sora_train.diffusion.draws import draw_noise
from sora_train.sampling.api import Model, load, with_settings
from sora_train.sampling.pipeline import decode_clip, sample_latents

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to sample."""

    name: str
    settings: dict[str, Any]
    step_cache: float = 0.0
    distilled: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of it."""

    name: str
    passes: float
    """Of a clip through the transformer's blocks; a guided step takes two."""
    seconds: float
    scores: dict[str, float]
    error: float
    """Root mean square distance of the latents from those of the first row, over the root mean square of these."""


def ways(steps: int, *, distilled: bool) -> Iterator[Way]:
    """The full number of steps first."""
    yield Way(f"{steps} guided steps", {"steps": steps})
    for few in (4, 1):
        yield Way(f"{few} guided", {"steps": few})
        yield Way(f"{few} without guidance", {"steps": few, "guidance_scale": 1.0})
    for few in (4, 2, 1) if distilled else ():
        yield Way(f"{few}, distilled", {"steps": few}, distilled=True)
    for low, high in ((0.5, 1.0), (0.8, 1.0), (0.0, 0.8)):
        interval = {"guidance_from": low, "guidance_to": high}
        yield Way(f"{steps}, guided from {low:g} to {high:g}", {"steps": steps} | interval)
    for threshold in (0.05, 0.1, 0.2, 0.4):
        yield Way(f"{steps} guided, step cache {threshold:g}", {"steps": steps}, threshold)
    yield Way(f"{steps} guided steps, again", {"steps": steps})


class Bench:
    """The same prompts and noise for every way."""

    def __init__(self, run: str, distilled: str, prompts: int):
        self.teacher = load(run)
        self.student = load(distilled) if distilled else None
        self.prompts: list[Prompt] = eval_prompts(prompts, held_out=False)
        self.passes = 0
        self.reference: Tensor | None = None
        for model in filter(None, (self.teacher, self.student)):
            model.model.transformer.blocks[0].register_forward_pre_hook(self._count)

    def _count(self, _: Any, given: tuple[Tensor, ...]) -> None:
        self.passes += len(given[0])

    def measure(self, way: Way) -> Result:
        model = self.student if way.distilled else self.teacher
        assert model is not None
        self.passes, began = 0, time.process_time()
        latents = self.latents(model, way)
        seconds = time.process_time() - began
        if self.reference is None:
            self.reference = latents
        error = (latents - self.reference).square().mean().sqrt()
        clips = [decode_clip(model.vae, one) for one in latents]
        return Result(
            way.name,
            self.passes / len(self.prompts),
            seconds,
            score(clips, self.prompts),
            float(error / self.reference.square().mean().sqrt()),
        )

    def latents(self, model: Model, way: Way) -> Tensor:
        shape, spec = model.shape, with_settings(model.spec, way.settings)
        size = model.vae.latent_shape(shape.frames, shape.height, shape.width)
        made = []
        for start in range(0, len(self.prompts), BATCH):
            texts = [prompt.text for prompt in self.prompts[start : start + BATCH]]
            keys = [(0, start + number) for number in range(len(texts))]
            made.append(
                sample_latents(
                    model.model,
                    spec,
                    texts,
                    draw_noise(1, "sample", keys, size),
                    shape.told_fps,
                    step_cache=way.step_cache,
                )
            )
        return torch.cat(made)


def line(result: Result, first: Result) -> str:
    """A row of the table in Markdown."""
    scores = " | ".join(f"{result.scores[key]:.1%}" for key in ("shape", "colour", "motion"))
    ratio = f"{result.seconds / first.seconds:.2f}"
    return f"| {result.name} | {result.passes:.1f} | {ratio} | {result.error:.2f} | {scores} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sora bench few-steps", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--distilled", default="")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", default="", help="Ways whose names contain this, and the first.")
    parser.add_argument("--out", type=Path, help="Folder for few_steps.json.")
    given = parser.parse_args(argv)
    bench = Bench(given.run, given.distilled, given.prompts)
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, commit {commit()}", flush=True)
    print("| | passes | seconds | error | shape | colour | motion |\n|---|--:|--:|--:|--:|--:|--:|")
    results: list[Result] = []
    for way in ways(given.steps, distilled=bool(given.distilled)):
        if results and given.only not in way.name:
            continue
        results.append(bench.measure(way))
        print(line(results[-1], results[0]), flush=True)
    if given.out:
        values = [dataclasses.asdict(result) for result in results]
        given.out.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out / "few_steps.json", json.dumps(values, indent=1) + "\n")
    return 0
