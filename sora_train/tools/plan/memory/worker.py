"""A process of its own that counts memory on fake tensors, since its fake process group would disturb its caller's.

A line of JSON in (config, world, bucket, clips), a line of JSON out: the bytes by kind at the height of
each moment, of two depths of the model, and what the frozen networks hold.
"""

import json
import os
import sys
import warnings
from typing import Any

DEPTHS = (4, 6)
"""Depths that are run where the model is deeper: what equal blocks hold is affine in their number."""


def answer(question: dict[str, Any]) -> dict[str, Any]:
    from sora_train.config import Config
    from sora_train.data.sample import Bucket
    from sora_train.tools.plan.memory.encoders import frozen_text_bytes, latent_shape, vae_bytes
    from sora_train.tools.plan.memory.step import step_peaks

    cfg = Config.model_validate_json(question["config"])
    bucket, clips = Bucket(*question["bucket"]), question["clips"]
    if question["part"] == "encoders":
        text, caption = frozen_text_bytes(cfg.text)
        vae, clip = vae_bytes(cfg, bucket)
        apart = max(vae + clip, text + caption)
        return {"weights": text + vae, "encode": max(clip, caption * clips), "apart": apart}
    shape = latent_shape(cfg, bucket)
    peaks = step_peaks(cfg, question["world"], shape, clips, cfg.text.max_length)
    return {"peaks": peaks}


def main() -> None:
    # What comes out is read by a program: whatever else prints does so on stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    import sora_train.tools.plan.memory.step  # noqa: F401

    for line in sys.stdin:
        # Each count in a copy of this process: what a process group leaves behind meets no other one.
        child = os.fork()
        if not child:
            out.write(json.dumps(explained(json.loads(line))) + "\n")
            out.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            out.write(json.dumps({"error": f"the count ended with status {status}"}) + "\n")
            out.flush()


def explained(question: dict[str, Any]) -> dict[str, Any]:
    """The answer, or what went wrong."""
    from sora_train.errors import UserError

    try:
        return answer(question)
    except UserError as error:
        return {"error": str(error), "user": True}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
