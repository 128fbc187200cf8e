"""An adapter as the file that other tools load: `sora ckpt export` of an adapter's run, or of another file."""

from pathlib import Path

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import split_step
from sora_train.errors import UserError
from sora_train.models.adapters.files.writing import LAYOUTS, write_adapter
from sora_train.sampling.adapters import open_adapter

SUFFIX = ".safetensors"


def holds_adapter(text: str) -> bool:
    """Whether FILE, RUN or RUN@STEP is an adapter's. Raises UserError where there is no such run."""
    if Path(text).is_file():
        return True
    config = checkpoints.find(*split_step(text)).state().get("config", {})
    return bool(config.get("adapter", {}).get("rank"))


def export_adapter(source: str, out: Path, layout: str, weights: str = "ema") -> str:
    """Write the file and return what was done, in lines.

    Args:
        source: FILE, RUN or RUN@STEP.
        layout: `diffusers` or `comfyui`.
        weights: of a run, `ema`, `live` or another average.

    Raises:
        UserError: the layout is not known, `out` is no such file's name or exists, or the adapter cannot be read.
    """
    known = [one for one in LAYOUTS if one == layout]
    if not known:
        raise UserError(
            f"--to {layout} is not known; the layouts of an adapter are: {', '.join(LAYOUTS)}"
        )
    if out.suffix != SUFFIX:
        raise UserError(f"--out {out} is an adapter's file; give it a name that ends in {SUFFIX}")
    if out.exists():
        raise UserError(f"--out {out} exists; name a new file or remove it")
    adapter = open_adapter(source, weights).weights
    write_adapter(adapter, out, known[0])
    about, modules = adapter.about, adapter.modules.values()
    ranks = sorted({factors.rank for factors in modules})
    size = out.stat().st_size / 1e6
    alpha = "of each its own" if about.alpha is None else f"{about.alpha:g}"
    lines = [
        f"{len(modules)} modules of rank {', '.join(map(str, ranks))}, alpha {alpha}, trained on "
        f"{about.base or 'no known base'}"
    ]
    if any(factors.magnitude is not None for factors in modules) and layout == "comfyui":
        lines.append(
            "differs: ComfyUI divides DoRA's lengths by those of the base's rows, not of the adapted ones, and "
            "diffusers leaves them out of this layout; `sora ckpt merge` is exact"
        )
    if about.trigger:
        lines.append(f"call it up with: {about.trigger}")
    return "\n".join([*lines, f"wrote {out} ({size:.1f} MB)", f"next: {_next(out, layout)}"])


def _next(out: Path, layout: str) -> str:
    if layout == "comfyui":
        return f"put {out.name} into ComfyUI's models/loras, or WanPipeline.load_lora_weights({str(out)!r})"
    return f"WanPipeline.load_lora_weights({str(out)!r})"
