"""`sora sample`: its flags and help."""

from pathlib import Path
from types import SimpleNamespace

from sora_train.tools.sample import flags
from sora_train.tools.terminal import AdapterBase, Adapters, AnyBase, ProjectFile


def sample(
    ckpt: flags.Ckpt,
    out: flags.Out = Path("samples"),
    prompt: flags.Prompt = None,
    prompts: flags.Prompts = None,
    storyboard: flags.Storyboard = None,
    upsample: flags.Upsample = "",
    upsample_model: flags.UpsampleModel = "",
    negative_prompt: flags.NegativePrompt = "",
    op: flags.Op = "t2v",
    image: flags.Image = None,
    last_image: flags.LastImage = None,
    video: flags.Video = None,
    reference: flags.Reference = None,
    frames_given: flags.FramesGiven = None,
    gap: flags.Gap = None,
    strength: flags.Strength = None,
    condition_noise: flags.ConditionNoise = 0.0,
    size: flags.Size = None,
    frames: flags.Frames = None,
    fps: flags.Fps = None,
    seed: flags.Seed = None,
    steps: flags.Steps = None,
    solver: flags.Solver = None,
    guidance_scale: flags.GuidanceScale = None,
    guidance_scale_2: flags.GuidanceScale2 = None,
    condition_scale: flags.ConditionScale = None,
    guidance_interval: flags.GuidanceInterval = None,
    guidance_rescale: flags.GuidanceRescale = None,
    step_cache: flags.StepCache = 0.0,
    seconds: flags.Seconds = None,
    anchor_fps: flags.AnchorFps = None,
    smooth_fps: flags.SmoothFps = None,
    refine: flags.Refine = None,
    num: flags.Num = 1,
    ema: flags.Weights = "ema",
    other_expert: flags.OtherExpert = "",
    dtype: flags.Dtype = "auto",
    adapter: Adapters = None,
    base: AdapterBase = "",
    any_base: AnyBase = False,
    project: ProjectFile = None,
    parallel: flags.Parallel = "auto",
) -> None:
    """Sample clips from a checkpoint into mp4 files and a contact sheet.

    \b
    sora sample --ckpt runs/quickstart --prompt "red circle moves left" --num 4
    sora sample --ckpt runs/quickstart@600 --prompts prompts.txt --out clips --seed 7
    sora sample --ckpt RUN --prompt "..." --op i2v --image first.png --last-image last.png
    sora sample --ckpt RUN --prompt "..." --op extend --video a.mp4 --frames-given 9
    sora sample --ckpt RUN --prompt "..." --op infill --video a.mp4 --gap 5:13
    sora sample --ckpt RUN --prompt "..." --op connect --video a.mp4 --video b.mp4
    sora sample --ckpt RUN --prompt "..." --op edit --video a.mp4 --strength 0.6
    sora sample --ckpt RUN --storyboard board.yaml
    sora sample --ckpt RUN --prompt "..." --seconds 60 --smooth-fps 24
    sora sample --ckpt RUN --prompt "..." --adapter zork.safetensors:0.8 --adapter runs/style
    torchrun --nproc-per-node 4 -m sora_train sample --ckpt RUN --prompt "..." --parallel guidance=2,context=2
    """
    run(SimpleNamespace(**locals()))


def run(asked: SimpleNamespace) -> None:
    """Make what was asked for, and print the files."""
    if asked.storyboard is not None:
        from sora_train.tools.sample.work import storyboard_seconds

        asked.seconds = storyboard_seconds(asked)
    from sora_train.sampling.ranks.team import with_one_voice

    if asked.seconds is not None:
        from sora_train.tools.sample.long import long_to_folder as to_folder
    else:
        from sora_train.tools.sample.work import require_no_long
        from sora_train.tools.sample.work import sample_to_folder as to_folder

        require_no_long(asked)
    for path in with_one_voice(lambda world: to_folder(asked, world)):
        print(path)
