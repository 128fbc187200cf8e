"""`sora bench`: measures on this machine, beside peers; each sub-command hands its arguments to a benchmark's `main`.

The command `sora` finds this file in the checkout that it runs from.
"""

from sora_train.tools.terminal import OVERRIDES, Overrides, command_group

bench_app = command_group("Measure; every number goes with its machine and commit.")


@bench_app.command("all", context_settings=OVERRIDES)
def bench_all(arguments: Overrides = None) -> int:
    """Measure everything beside its peers, in turns, into one table: what, ours, peer, ratio, floor, target.

    --quick in less than five minutes on two cores, --only PART one part (transformer, loop, sampling, loader,
    checkpoint), --out DIR where the results go. benchmarks/README.md explains each row.

    \b
    sora bench all --quick
    sora bench all --only sampling
    """
    from benchmarks.overview import main

    return main(arguments or [])


@bench_app.command("train", context_settings=OVERRIDES)
def bench_train(arguments: Overrides = None) -> int:
    """Measure training steps: warm-up, then median and spread, as JSON and Markdown.

    Overrides choose what is trained; --steps N and --warmup N how much of it is measured, --out DIR where the
    results go.

    \b
    sora bench train experiment=quickstart --steps 30 --warmup 5 --out benchmarks/results
    """
    from benchmarks.train import main

    return main(arguments or [])


@bench_app.command("data", context_settings=OVERRIDES)
def bench_data(arguments: Overrides = None) -> int:
    """Measure the loader beside the bare decoder and plain webdataset, on the same clips and processes.

    Overrides choose the clips and the loader. They take turns for --seconds S in all (90), at most --clips N a turn and
    --repeats N turns each; memory is watched over --soak N clips. --quick takes 30 seconds. --out DIR is where the
    results go, which are written after each round.

    \b
    sora bench data experiment=quickstart --quick
    sora bench data experiment=quickstart data.shapes_clips=1000 --seconds 150 --soak 5000
    sora bench data experiment=real_tiny data.source=shards buckets=256px
    """
    from benchmarks.data import main

    return main(arguments or [])


@bench_app.command("cost", context_settings=OVERRIDES)
def bench_cost(arguments: Overrides = None) -> int:
    """Measure forward and backward at several clip lengths and fit what a clip costs: a * S + b * S^2.

    Micro-batches are sized and dealt out by that cost. By default it comes from the model's FLOPs; what a machine
    really takes differs with kernels and sizes, so measure on the machine that trains and paste the two values that
    are printed. Overrides choose the model; tokens=A,B,C the tokens of the clips measured (three or more; by default
    up to the largest bucket's or data.micro_batch_tokens), --repeats N how often, --out DIR where the results go.

    \b
    sora bench cost experiment=quickstart
    sora bench cost experiment=real_tiny buckets=256px tokens=1000,2000,4000,8000 --repeats 10
    sora train experiment=quickstart data.cost_a=1.1e-4 data.cost_b=2.3e-8         (the values it printed)
    """
    from sora_train.tools.plan.cost import main

    return main(arguments or [])


@bench_app.command("model", context_settings=OVERRIDES)
def bench_model(arguments: Overrides = None) -> int:
    """Measure forward and backward of the transformer beside diffusers' on the same weights, shape and dtype.

    Overrides are those of the section model; --tokens N the clip's length, --dtype float32,bfloat16 and --modes
    eager,dynamic,static what is measured, --repeats N how often, --out DIR where the results go.

    \b
    sora bench model --tokens 1024 --repeats 3
    sora bench model model=wan_1_3b model.attention=flash --tokens 8192 --dtype bfloat16 --device cuda
    """
    from benchmarks.model import main

    return main(arguments or [])


@bench_app.command("memory", context_settings=OVERRIDES)
def bench_memory(arguments: Overrides = None) -> int:
    """Measure what each memory option saves and costs: bytes, seconds, and with --longest how long a clip fits.

    Overrides are those of the section model; --tokens N the clip's length, --options "full;offload" which ones,
    --budget-mib M the memory that --longest may count on a CPU, --out DIR where the results go.

    \b
    sora bench memory --tokens 512 --device cpu
    sora bench memory model=wan_1_3b --tokens 16384 --longest --device cuda
    """
    from benchmarks.memory import main

    return main(arguments or [])


@bench_app.command("ckpt", context_settings=OVERRIDES)
def bench_ckpt(arguments: Overrides = None) -> int:
    """Save one state at once and behind the training, in turns: how long the training waits for each.

    --mib N the size of the state, --repeats N how often, --device cuda where it lies, --folder DIR the disk, --out DIR
    where the results go.

    \b
    sora bench ckpt --mib 1024 --repeats 5
    """
    from benchmarks.ckpt import main

    return main(arguments or [])


@bench_app.command("sampling", context_settings=OVERRIDES)
def bench_sampling(arguments: Overrides = None) -> int:
    """Measure guided sampling beside diffusers' WanPipeline: the same weights, scheduler, steps and noise, in turns.

    --clips NAME,.. which sizes (image, short, short_text, long), --steps N and --repeats N how much of it is measured,
    --threads N on how many.

    \b
    sora bench sampling --clips image --repeats 3
    """
    from benchmarks.sampling_peer import main

    return main(arguments or [])


@bench_app.command("vae", context_settings=OVERRIDES)
def bench_vae(arguments: Overrides = None) -> int:
    """Encode and decode held-out clips: PSNR and SSIM beside the compression ratio, frames a second.

    Overrides choose the VAE and the clips; --clips N how many at most, --out DIR where the results go.

    \b
    sora bench vae experiment=quickstart
    sora bench vae experiment=real_tiny data.source=clips vae.path=weights/wan2.1 --clips 8
    """
    from benchmarks.vae import main

    return main(arguments or [])


@bench_app.command("long", context_settings=OVERRIDES)
def bench_long(arguments: Overrides = None) -> int:
    """Judge long videos: what the oracle reads of their first and last second, their memory, and kills.

    The first argument says which: quality, memory or kills. --seconds N (60), --steps N of the sampler, --out DIR where
    the results go; quality: --prompts N (32), --anchor-fps N (0: none), --smooth-fps N; memory: --size N; kills:
    --times N (5).

    \b
    sora bench long quality runs/quickstart_long --prompts 32
    sora bench long memory --size 256
    sora bench long kills runs/quickstart_long --seconds 20
    """
    from benchmarks.long import main

    return main(arguments or [])


@bench_app.command("few-steps", context_settings=OVERRIDES)
def bench_few_steps(arguments: Overrides = None) -> int:
    """Score a model of the shapes world with fewer steps, without guidance, distilled, and with a step cache.

    RUN is sampled in every way with the same prompts and noise, --distilled RUN beside it; --prompts N (256) and
    --steps N (50) of the first row, --only TEXT the rows whose names contain it, --out DIR where the results go.

    \b
    sora bench few-steps runs/quickstart --distilled runs/quickstart-distilled
    sora bench few-steps runs/quickstart --prompts 64 --only cache
    """
    from benchmarks.few_steps import main

    return main(arguments or [])


@bench_app.command("serve", context_settings=OVERRIDES)
def bench_serve(arguments: Overrides = None) -> int:
    """Load `sora serve`, kill it, and measure what it adds to the sampler; real processes over 127.0.0.1.

    The first argument says which: load, chaos or overhead. --ckpt RUN what makes the videos (a tiny model),
    --postgres in place of SQLite, --clients N and --seconds S how much, --kills N of chaos, --out DIR where the results
    go. The exit code is 1 where anything was lost, doubled, or answered 5xx.

    \b
    sora bench serve load --clients 200 --seconds 60 --postgres
    sora bench serve chaos --seconds 300 --kills 20
    sora bench serve overhead
    """
    from benchmarks.serve import main

    return main(arguments or [])


@bench_app.command("watermark", context_settings=OVERRIDES)
def bench_watermark(arguments: Overrides = None) -> int:
    """Mark clips invisibly, crop, scale and compress them, and count what the key finds and what other keys find.

    --videos DIR real clips beside those of the shapes world, --shapes N scenes of each size, --keys N for each clip,
    --trials N looks for false alarms, --out DIR where the results go.

    \b
    sora bench watermark --keys 1 --trials 0
    sora bench watermark --videos clips --keys 3 --trials 30000
    """
    from benchmarks.watermark import main

    return main(arguments or [])
