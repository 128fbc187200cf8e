"""GPUs and their health, by nvidia-smi: a sick GPU blocks whoever queries it, so a process of its own does."""

import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import partial
from typing import Any

from sora_train.tools.doctor.findings import FAIL, INFO, WARN, Finding, info, judged

HOT = 85.0
SECONDS = 12.0


@dataclass(frozen=True)
class GpuState:
    """Degrees Celsius, MiB, counts. None: not known."""

    name: str
    memory: int | None
    used: int | None
    temperature: float | None
    throttled: tuple[str, ...]
    """Why its clock is below what it could be, the harmless reasons left out."""
    uncorrected: int
    remapping: bool
    """Whether a row of memory waits to be remapped by a reset, or could not be."""
    mig: bool
    processes: tuple[str, ...]
    mode: str = ""
    pcie: str = ""


HARMLESS = (
    "gpu_idle",
    "applications_clocks_setting",
    "sw_power_cap",
    "sync_boost",
    "display_clock_setting",
)


def read(_argument: object = None) -> dict[str, Any]:
    """The output of nvidia-smi, unchanged."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"query": "", "links": "", "kernel": ""}
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    query = run([program, "-q", "-x"])
    links = run([program, "nvlink", "-s"]).stdout
    messages = run(["dmesg"]).stdout if shutil.which("dmesg") else ""
    kernel = "\n".join(line for line in messages.splitlines() if "NVRM: Xid" in line)
    if query.returncode:
        failed = (query.stdout + query.stderr).strip()[:300]
        return {"query": "", "links": links, "kernel": kernel, "failed": failed}
    return {"query": query.stdout, "links": links, "kernel": kernel, "failed": ""}


def parsed(xml: str) -> tuple[str, list[GpuState]]:
    """The driver's version, and the GPUs, of `nvidia-smi -q -x`."""
    root = ET.fromstring(xml)
    driver = root.findtext("driver_version", "")
    return driver, [_gpu(gpu) for gpu in root.findall("gpu")]


def _gpu(gpu: ET.Element) -> GpuState:
    reasons = [
        entry
        for kind in ("clocks_event_reasons", "clocks_throttle_reasons")
        for entry in gpu.findall(f"{kind}/*")
    ]
    active = [
        entry.tag.removeprefix("clocks_event_reason_").removeprefix("clocks_throttle_reason_")
        for entry in reasons
        if (entry.text or "").strip() == "Active"
    ]
    # Newer drivers have sram_uncorrectable_parity and others; all of them lie below ecc_errors/volatile.
    wrong = [
        _number(entry.text) or 0
        for entry in gpu.findall("ecc_errors/volatile//*")
        if "uncorrectable" in entry.tag
    ]
    pending = gpu.findtext("remapped_rows/remapped_row_pending", "No")
    failure = gpu.findtext("remapped_rows/remapped_row_failure", "No")
    return GpuState(
        name=gpu.findtext("product_name", "?"),
        memory=_whole(gpu.findtext("fb_memory_usage/total")),
        used=_whole(gpu.findtext("fb_memory_usage/used")),
        temperature=_number(gpu.findtext("temperature/gpu_temp")),
        throttled=tuple(dict.fromkeys(name for name in active if name not in HARMLESS)),
        uncorrected=int(sum(wrong)),
        remapping="Yes" in (pending, failure),
        mig=gpu.findtext("mig_mode/current_mig", "") == "Enabled",
        processes=tuple(
            f"{entry.findtext('process_name', '?')} ({entry.findtext('pid', '?')})"
            for entry in gpu.findall("processes/process_info")
            if entry.findtext("type", "C") != "G"
        ),
        mode=gpu.findtext("compute_mode", ""),
        pcie=_pcie(gpu),
    )


def _pcie(gpu: ET.Element) -> str:
    link = "pci/pci_gpu_link_info"
    generation = gpu.findtext(f"{link}/pcie_gen/max_link_gen", "")
    width = gpu.findtext(f"{link}/link_widths/current_link_width", "")
    return f"PCIe {generation} {width}" if generation and width else ""


def _number(text: str | None) -> float | None:
    word = (text or "").split(" ")[0]
    return float(word) if word.replace(".", "", 1).isdigit() else None


def _whole(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


def compared(output: dict[str, Any]) -> dict[str, str]:
    """What should be the same on all nodes."""
    if not output["query"]:
        return {"GPUs": "none"}
    driver, gpus = parsed(output["query"])
    return {"driver": driver, "GPUs": ", ".join(gpu.name for gpu in gpus)}


def judge(
    output: dict[str, Any], *, ranks: int, required: bool, kernel_files: bool
) -> list[Finding]:
    """`required`: whether the run asks for GPUs; `kernel_files`: whether the kernel has an NVIDIA device."""
    if output.get("failed"):
        remedy = "the driver does not answer as it should: nvidia-smi by hand, dmesg, then a reboot of the node"
        return [Finding("GPUs", output["failed"], FAIL, remedy)]
    if not output["query"]:
        needed = "run.device=cuda needs one: ask for GPUs (launch.gpus), or set run.device=cpu"
        missing = "the kernel has NVIDIA devices, but nvidia-smi is missing: install the driver's tools, or start the "
        missing += "container with --gpus all"
        steps = (required, FAIL, needed), (kernel_files, WARN, missing)
        return [judged("GPUs", "none", *steps, good=INFO)]
    driver, gpus = parsed(output["query"])
    names = ", ".join(
        dict.fromkeys(f"{gpu.name} {(gpu.memory or 0) / 1024:.0f} GiB" for gpu in gpus)
    )
    few = f"{ranks} ranks share {len(gpus)} GPU(s): --nproc-per-node (launch.ranks) must not be more than the GPUs"
    lines = [
        judged("GPUs", f"{len(gpus)} x {names}, driver {driver}", (ranks > len(gpus), FAIL, few)),
        info("GPU links", links_of(output["links"], gpus)),
    ]
    for number, gpu in enumerate(gpus):
        lines += judge_gpu(number, gpu)
    kernel = output["kernel"].splitlines()
    if kernel:
        remedy = "look the number up in NVIDIA's list of XIDs; 48, 63, 64, 74, 79, 94, 95 mean hardware: drain the node"
        lines.append(Finding("XID in the kernel's log", kernel[-1][-120:], WARN, remedy))
    return lines


def judge_gpu(number: int, gpu: GpuState) -> list[Finding]:
    """One line for a healthy GPU, else a line for each problem."""
    hot = gpu.temperature is not None and gpu.temperature > HOT
    degrees = "?" if gpu.temperature is None else f"{gpu.temperature:.0f}"
    name = f"GPU {number}"
    wrong = [
        (bool(gpu.processes), "used by " + ", ".join(gpu.processes[:3]), WARN,
         "an old run holds its memory: end it, or ask for the node alone"),
        (hot, f"{degrees} degrees", WARN, "it slows down: look at the fans and the rack, or drain the node"),
        (bool(gpu.throttled), "slowed by " + ", ".join(gpu.throttled), WARN,
         "thermal or power trouble makes all ranks as slow as this one: have the node looked at"),
        (gpu.uncorrected > 0, f"{gpu.uncorrected} uncorrected memory errors", FAIL,
         "its memory is faulty: reset the GPU, and drain the node if they come again"),
        (gpu.remapping, "a row of memory is to be remapped", WARN, "reset the GPU (nvidia-smi -r) before the run"),
        (gpu.mig, "MIG is on", WARN, "ranks see slices of it: nvidia-smi -mig 0, unless that is meant"),
        (gpu.mode == "Prohibited", "compute mode is Prohibited", FAIL, "nvidia-smi -c 0"),
    ]  # fmt: skip
    findings = [
        Finding(name, value, verdict, remedy) for holds, value, verdict, remedy in wrong if holds
    ]
    healthy = f"{degrees} degrees, {(gpu.used or 0):,} MiB used, no errors"
    return findings or [Finding(name, ", ".join(filter(None, [healthy, gpu.pcie])))]


def links_of(text: str, gpus: list[GpuState]) -> str:
    """In one line: how many NVLinks, and of what speed."""
    speeds = [
        part.split(":", 1)[1].strip()
        for part in text.splitlines()
        if "GB/s" in part and ":" in part
    ]
    if not speeds:
        pcie = dict.fromkeys(gpu.pcie for gpu in gpus if gpu.pcie)
        return f"no NVLink; {', '.join(pcie) or 'PCIe'}"
    return f"{len(speeds) // max(1, len(gpus))} NVLinks a GPU at {', '.join(dict.fromkeys(speeds))}"
