"""Environment variables that change how ranks talk, how fast they are, and whether they say why they stopped."""

from collections.abc import Mapping

from sora_train.tools.doctor.findings import FAIL, OK, WARN, Finding, Verdict, info

PREFIXES = (
    "NCCL_",
    "GLOO_",
    "CUDA_",
    "TORCH",
    "PYTORCH_",
    "HF_",
    "TRANSFORMERS_",
    "OMP_",
    "WANDB_MODE",
    "SORA_",
)
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SECRETS = ("TOKEN", "KEY", "PASSWORD", "SECRET")

WRONG: tuple[tuple[str, tuple[str, ...], Verdict, str], ...] = (
    ("NCCL_DEBUG", ("INFO", "TRACE"), WARN, "NCCL writes a log of every rank; unset it once the question is answered"),
    ("NCCL_P2P_DISABLE", ("1",), WARN, "GPUs of a node talk over the host's memory; unset it unless they hang without"),
    ("NCCL_SHM_DISABLE", ("1",), WARN, "ranks of a node talk over the network; unset it"),
    ("NCCL_IB_DISABLE", ("1",), WARN, "nodes talk over TCP; unset it where there is InfiniBand or RoCE"),
    ("NCCL_ALGO", ("Ring", "Tree"), WARN, "NCCL may not choose what is fastest for each size; unset it"),
    ("CUDA_LAUNCH_BLOCKING", ("1",), WARN, "every kernel is waited for; unset it once the question is answered"),
    ("TORCH_DISTRIBUTED_DEBUG", ("DETAIL",), WARN, "every collective is checked by another one; unset it"),
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", ("0",), WARN, "a lost rank hangs the others without a word; unset it"),
    ("TORCH_NCCL_ENABLE_MONITORING", ("0",), WARN, "a stuck watchdog is not noticed; unset it"),
    ("TORCH_FR_BUFFER_SIZE", ("0",), WARN, "the collectives before a hang are not written down; unset it"),
    ("TORCH_NCCL_TRACE_BUFFER_SIZE", ("0",), WARN, "the collectives before a hang are not written down; unset it"),
)  # fmt: skip
"""Variable, values, verdict, remedy."""


def chosen(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, secrets hidden."""
    shown = {}
    for name, value in sorted(environ.items()):
        if name.startswith(PREFIXES) and not name.startswith("TORCHELASTIC_"):
            shown[name] = "(set)" if any(part in name for part in SECRETS) else value
        elif name.lower() in PROXIES:
            shown[name] = value.rpartition("@")[2]
    return shown


def judge(
    environ: Mapping[str, str], *, interfaces: list[str], cores: int, ranks: int
) -> list[Finding]:
    """`cores` that this node's `ranks` may use; `interfaces` that it has."""
    findings = [
        Finding(name, environ[name], verdict, remedy)
        for name, values, verdict, remedy in WRONG
        if environ.get(name, "").lower() in [value.lower() for value in values]
    ]
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        pattern = environ.get(name, "")
        if pattern and not any(interface_named(pattern, interface) for interface in interfaces):
            remedy = f"this node has {', '.join(interfaces)}: name one of them, or unset it (launch.interface)"
            findings.append(Finding(name, pattern, FAIL, remedy))
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) * ranks > cores and ranks * cores > 1:
        remedy = f"set it to {max(1, cores // ranks)}: {ranks} rank(s) share {cores} cores"
        findings.append(Finding("OMP_NUM_THREADS", threads, WARN, remedy))
    judged_names = {finding.name for finding in findings}
    rest = {name: value for name, value in chosen(environ).items() if name not in judged_names}
    plain = " ".join(f"{name}={value}" for name, value in rest.items())
    return [*findings, info("environment", plain or "nothing that changes how ranks run")]


def interface_named(pattern: str, interface: str) -> bool:
    """Whether NCCL's pattern (`eth`, `=eth0`, `^lo`, by comma) takes this interface."""
    refuses = pattern.startswith("^")
    names = [part for part in pattern.lstrip("^").split(",") if part]
    exact = pattern.lstrip("^").startswith("=")
    taken = any(
        interface == part.lstrip("=") if exact else interface.startswith(part.lstrip("="))
        for part in names
    )
    return taken != refuses


def judge_job(environ: Mapping[str, str], *, owns_master: bool | None) -> list[Finding]:
    """Whether scheduler, torchrun and this process mean the same job.

    `owns_master`: whether MASTER_ADDR is an address of this machine, None where that is not known.
    """
    size = int(environ.get("WORLD_SIZE", "1"))
    node = environ.get("GROUP_RANK", "")
    findings = []
    tasks, nodes = environ.get("SLURM_NTASKS", ""), environ.get("SLURM_NNODES", "")
    if "WORLD_SIZE" not in environ and (tasks or "1") != "1" and "SLURM_STEP_ID" in environ:
        remedy = "let srun start one torchrun a node, with --nnodes and --node-rank; see sora launch slurm --print"
        value = f"{tasks} SLURM tasks, each a world of its own"
        findings.append(Finding("job", value, FAIL, remedy))
    local = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if size > 1 and nodes.isdigit() and int(nodes) * local != size:
        remedy = "give torchrun --nnodes $SLURM_NNODES, and the same --nproc-per-node everywhere"
        value = f"{nodes} SLURM nodes x {local} ranks, and a world of {size}"
        findings.append(Finding("job", value, WARN, remedy))
    slurm = environ.get("SLURM_NODEID", "")
    if node and slurm and size > local and node != slurm:
        remedy = "$SLURM_NODEID was expanded before srun: put the command in single quotes (bash -c '...')"
        findings.append(Finding("node rank", f"{node} of torchrun, {slurm} of SLURM", WARN, remedy))
    if size > local and environ.get("RANK") == "0" and owns_master is False:
        remedy = (
            "MASTER_ADDR must be the first node of the job, not the login node; and only one node has node rank 0 "
            "($SLURM_NODEID in single quotes)"
        )
        value = f"rank 0 is here, and {environ.get('MASTER_ADDR')} is not this machine"
        findings.append(Finding("node rank", value, FAIL, remedy))
    return findings or [Finding("job", f"{size} rank(s), {local} on this node", OK)]
