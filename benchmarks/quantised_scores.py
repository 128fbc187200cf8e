"""How much a model of the shapes world loses when its matrices become codes of fp8, int8 or nf4: the oracle's scores.

    python -m benchmarks.quantised_scores runs/quickstart --prompts 192

Every kind paints the same prompts from the same noise, so differences are those of the weights alone.
"""

import argparse
import copy
from dataclasses import dataclass

from sora_train.data.shapes.oracle import score
from sora_train.data.shapes.world import eval_prompts
from sora_train.models.quantised.linear import quantise_base
from sora_train.sampling.api import load
from sora_train.sampling.pipeline import sample_clips

KINDS = ("compute", "fp8", "int8", "nf4")


@dataclass(frozen=True)
class Request:
    run: str
    prompts: int


def main(request: Request) -> None:
    loaded = load(request.run)
    loaded.model.requires_grad_(False)
    asked = {
        name: eval_prompts(request.prompts, held_out=held_out)
        for name, held_out in (("seen", False), ("held out", True))
    }
    for kind in KINDS:
        model = copy.deepcopy(loaded.model)
        quantise_base(model, kind)
        for name, prompts in asked.items():
            texts = [prompt.text for prompt in prompts]
            clips = sample_clips(
                model, loaded.vae, loaded.spec, texts, loaded.shape, seed=1, batch=32
            )
            scores = score(clips, prompts)
            said = ", ".join(f"{factor} {value:.1%}" for factor, value in scores.items())
            print(f"{kind:8} {name:9} {said}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=192)
    main(Request(**vars(parser.parse_args())))
