"""Run as a process of its own by test_sampling_ranks: every rank of every number of processes is a fork of it.

Arguments: a folder, a run to sample from, and the numbers of processes. What is measured goes to
FOLDER/found-SIZE.json, each number the worst over all ranks; what the ranks say in each task, and their exit code, to
FOLDER/TASK-SIZE.RANK.
"""

import copy
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.cli import run
from sora_train.diffusion.draws import draw_noise
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError, run_command
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.runtime.world import World
from sora_train.sampling import api
from sora_train.sampling.pipeline import ConditionFrames, encode_conditions, sample_latents
from sora_train.sampling.ranks.frames import FramesInTurn
from sora_train.sampling.ranks.layout import Layout
from sora_train.sampling.ranks.team import Team, with_one_voice
from sora_train.tools.doctor.parity.worker import import_everything

LAYOUTS = {
    2: [Layout(guidance=2), Layout(context=2), Layout(prompts=2)],
    4: [Layout(2, 2, 1), Layout(1, 2, 2), Layout(2, 1, 2), Layout(1, 4, 1), Layout(1, 1, 4)],
}
PROMPTS = ["a red circle", "", "a blue square moves left"]
SETTINGS = {"steps": 3, "guidance_scale": 3.0, "negative_prompt": ["", "grey", "still"]}
LONG = ["--seconds", "3"]
TASKS = 7
VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True],
    "attn_scales": [],
}  # fmt: skip


def worst(value: float) -> float:
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def load(run_dir: str) -> api.Model:
    """The run's model, with weights that no layer begins with: zeros would hide what lies behind them."""
    model = api.load(run_dir)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return model


def latents_of(model: api.Model, spec: DiffusionSpec, *, conditioned: bool) -> Tensor:
    """Of three prompts, in float64; `conditioned` by the first frame, with guidance by it too: three views."""
    shape = model.vae.latent_shape(9, 32, 48)
    noise = draw_noise(0, "sample", [(0, i) for i in range(3)], shape).double()
    conditions = None
    if conditioned:
        pixels = np.full((9, 32, 48, 3), 90, np.uint8)
        mask_T = torch.zeros(shape[1])
        mask_T[0] = 1
        conditions = encode_conditions(ConditionFrames(pixels, "i2v", mask_T), model.vae, spec)
    try:
        return sample_latents(
            model.model.double(), spec, PROMPTS, noise, 8.0, conditions=conditions
        )
    finally:
        model.model.float()


def measure_layout(
    world: World, layout: Layout, plain: api.Model, clips: list[np.ndarray]
) -> dict[str, float]:
    """Latents of one call, and clips from prompts to pixels, beside those of one process."""
    found = {}
    shared = copy.deepcopy(plain)
    shared.team = Team(world, layout, plain.cfg.model)
    shared.team.share(shared.model, shared.vae)
    made = shared.sample(PROMPTS, **SETTINGS)
    expected_clips = clips if world.is_main else []
    assert len(made) == len(expected_clips)
    pairs = zip(made, expected_clips, strict=True)
    found["clips apart"] = worst(
        max((np.abs(a.astype(int) - b).max() for a, b in pairs), default=0)
    )
    for conditioned in (False, True):
        scale = {"condition_scale": 2.0} if conditioned else {}
        spec = api.with_settings(plain.spec, {"steps": 3, "guidance_scale": 3.0, **scale})
        name = "latents, three views" if conditioned else "latents"
        expected = latents_of(plain, spec, conditioned=conditioned)
        got = latents_of(shared, spec, conditioned=conditioned)
        found[name] = worst(distance(got, expected))
        same = got.clone()
        dist.broadcast(same, 0)
        found[f"{name}, ranks apart"] = worst(float((same != got).sum()))
    return found


def measure_decoding(world: World) -> dict[str, float]:
    """Pixels that are not those of one process, by latent frames and size of tiles."""
    found = {}
    vae = VideoVAE(VAE, seed=3)
    for frames, tile in ((1, 0), (2, 0), (3, 0), (6, 0), (9, 0), (4, 16)):
        vae.use_tiles(tile)
        latents = torch.randn(1, 4, frames, 12, 12, generator=torch.Generator().manual_seed(frames))
        alone = vae.decode(latents)
        stream, vae.stream = vae.stream, FramesInTurn(dist.group.WORLD)
        decoded, calls = [], []
        hook = vae.autoencoder.decoder.conv_in.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        counts = torch.zeros_like(alone)
        for at, part in vae.decode_pieces(latents):
            decoded.append((at, part))
            counts[at] += 1
        hook.remove()
        vae.stream = stream
        together = torch.empty_like(alone)
        for at, part in decoded:
            together[at] = part
        name = f"{frames} frames, tiles of {tile}"
        found[f"wrong pixels of {name}"] = worst(float((together != alone).sum()))
        found[f"not once of {name}"] = worst(float((counts != 1).sum()))
        found[f"latent frames decoded of {name}"] = worst(len(calls))
    return found


def fail_on_one(world: World | None) -> None:
    """Rank 1 refuses while the others wait for it."""
    assert world is not None
    if world.rank == 1:
        raise UserError("rank 1 holds a bad file; give another")
    dist.barrier()


def vanish(world: World | None) -> None:
    """Rank 1 is killed."""
    assert world is not None
    if world.rank == 1:
        os._exit(9)
    dist.barrier()


def run_rank(rank: int, size: int, port: int, folder: Path, run_dir: str) -> None:
    """One of `size` processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"

    def measure(world: World | None) -> None:
        assert world is not None
        torch.set_num_threads(1)
        plain = load(run_dir)
        clips = plain.sample(PROMPTS, **SETTINGS)
        found = {
            str(layout): measure_layout(world, layout, plain, clips) for layout in LAYOUTS[size]
        }
        found["decoding"] = measure_decoding(world)
        if world.is_main:
            (folder / f"found-{size}.json").write_text(json.dumps(found, indent=1))

    command = ["sample", "--ckpt", run_dir, "--prompt", "a", "--prompt", "b", "--steps", "2"]
    tasks = {
        "measure": lambda: with_one_voice(measure),
        "sample": lambda: run([*command, "--out", str(folder / f"clips-{size}")]),
        "long": lambda: run([*command, *LONG, "--out", str(folder / f"long-{size}")]),
        "long_shared": lambda: run(
            [
                *command,
                *LONG,
                "--parallel",
                "prompts=1",
                "--out",
                str(folder / f"long_shared-{size}"),
            ]
        ),
        "refuse": lambda: run([*command, "--parallel", "context=3"]),
        "fail": lambda: with_one_voice(fail_on_one),
        "vanish": lambda: with_one_voice(vanish),
    }
    assert len(tasks) == TASKS
    for number, (name, task) in enumerate(tasks.items()):
        with (folder / f"{name}-{size}.{rank}").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ["MASTER_PORT"] = str(port + number)
        try:
            code = run_command(task)
        except SystemExit as silent:
            code = silent.code
        print(f"exit {code}", flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()


def stores(count: int) -> tuple[int, list[Any]]:
    """Neighbouring ports with a store at each, as torchrun has one that outlives its processes."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            first = int(found.getsockname()[1])
        try:
            return first, [
                dist.TCPStore("127.0.0.1", first + i, is_master=True, wait_for_workers=False)
                for i in range(count)
            ]
        except dist.DistError:
            continue


def main() -> None:
    folder = Path(sys.argv[1])
    import_everything()
    for size in map(int, sys.argv[3].split(",")):
        port, kept = stores(TASKS)
        context = torch.multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=run_rank, args=(rank, size, port, folder, sys.argv[2]))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        del kept


if __name__ == "__main__":
    main()
