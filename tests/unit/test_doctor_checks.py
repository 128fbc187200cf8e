"""What the doctor makes of readings: tables of made ones, laws of its estimates, and probes of this machine."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sentences import says

from sora_train.errors import EXIT_FAULT, Fault
from sora_train.tools.doctor.checks import (
    clock,
    environment,
    gpus,
    limits,
    network,
    storage,
    versions,
)
from sora_train.tools.doctor.findings import FAIL, INFO, OK, WARN, Finding, worst
from sora_train.tools.doctor.nodes import bandwidth, peers
from sora_train.tools.doctor.nodes.deadline import LateError, all_checked, apart, checked, within
from sora_train.tools.doctor.nodes.examination import ended_after, unique_names
from sora_train.tools.doctor.table import NodeReport, Report, show

GIB = 2**30
WELL = limits.Limits(
    open_files=65536, open_files_hard=65536, processes=None, locked=None, shm_total=64 * GIB, shm_free=64 * GIB,
    tmp="/tmp", tmp_free=50 * GIB, cores=64, usable_cores=64, quota_cores=None, memory=512 * GIB,
    memory_free=400 * GIB, memory_limit=None, swap_used=0,
)  # fmt: skip


def wrong(findings: list[Finding]) -> dict[str, str]:
    return {one.name: str(one.verdict) for one in findings if one.verdict.wrong}


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"open_files": 1024}, {"open files": "warn"}),
        ({"processes": 512}, {"processes": "warn"}),
        ({"locked": 65536}, {"locked memory": "fail"}),
        ({"shm_total": 64 * 2**20, "shm_free": 64 * 2**20}, {"/dev/shm": "warn"}),
        ({"shm_free": 2**20}, {"/dev/shm": "fail"}),
        ({"tmp_free": 2**20}, {"temporary folder": "fail"}),
        ({"usable_cores": 1}, {"CPU cores": "fail"}),
        ({"usable_cores": 16}, {"CPU cores": "warn"}),
        ({"quota_cores": 4.0}, {"CPU cores": "fail"}),
        ({"memory_free": 10 * GIB}, {"memory": "warn"}),
        ({"swap_used": 3 * GIB}, {"swap in use": "warn"}),
    ],
)
def test_limits_are_judged(changed: dict, expected: dict):
    found = limits.judge(dataclasses.replace(WELL, **changed), ranks=8, workers=4, infiniband=True)
    assert wrong(found) == expected


def test_the_remedy_of_few_files_depends_on_the_hard_limit():
    soft = dataclasses.replace(WELL, open_files=1024)
    hard = dataclasses.replace(soft, open_files_hard=1024)
    said = [
        limits.judge(one, ranks=1, workers=0, infiniband=False)[0].remedy for one in (soft, hard)
    ]
    assert "ulimit -n" in said[0] and "nofile" in said[1]


def test_locked_memory_matters_with_infiniband_alone():
    found = limits.judge(
        dataclasses.replace(WELL, locked=65536), ranks=8, workers=4, infiniband=False
    )
    assert wrong(found) == {}


def test_the_limits_of_this_machine_are_read():
    found = limits.read()
    assert 1 <= found.usable_cores <= found.cores
    assert 0 < found.memory_free <= found.memory
    assert found.tmp_free > 0


# -- environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "4"}, {}),
        ({"NCCL_DEBUG": "info"}, {"NCCL_DEBUG": "warn"}),
        ({"NCCL_IB_DISABLE": "1"}, {"NCCL_IB_DISABLE": "warn"}),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "warn"}),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "fail"}),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, {}),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, {}),
        ({"OMP_NUM_THREADS": "64"}, {"OMP_NUM_THREADS": "warn"}),
    ],
)
def test_variables_are_judged(environ: dict, expected: dict):
    found = environment.judge(environ, interfaces=["lo", "eth0"], cores=64, ranks=8)
    assert wrong(found) == expected


def test_no_secret_is_shown():
    shown = environment.judge(
        {"HF_TOKEN": "hf_abc", "https_proxy": "http://me:pw@proxy:80", "HOME": "/root"},
        interfaces=["lo"], cores=1, ranks=1,
    )[-1].value  # fmt: skip
    assert "hf_abc" not in shown and "pw" not in shown and "HOME" not in shown
    assert "HF_TOKEN=(set)" in shown and "https_proxy=proxy:80" in shown


WORLD = {
    "WORLD_SIZE": "16",
    "LOCAL_WORLD_SIZE": "8",
    "RANK": "0",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "n0",
}


@pytest.mark.parametrize(
    ("changed", "owns", "expected"),
    [
        ({}, True, {}),
        ({}, False, {"node rank": "fail"}),
        ({"RANK": "8", "GROUP_RANK": "1", "SLURM_NODEID": "1"}, False, {}),
        ({"RANK": "8", "GROUP_RANK": "1", "SLURM_NODEID": "0"}, False, {"node rank": "warn"}),
        ({"SLURM_NNODES": "4"}, True, {"job": "warn"}),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, True, {}),
    ],
)
def test_the_scheduler_and_torchrun_must_mean_one_job(changed: dict, owns: bool, expected: dict):
    assert wrong(environment.judge_job(WORLD | changed, owns_master=owns)) == expected


def test_tasks_without_a_launcher_are_worlds_of_their_own():
    environ = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
    assert wrong(environment.judge_job(environ, owns_master=None)) == {"job": "fail"}


# -- network --------------------------------------------------------------------------------------


def a_network(**changed: object) -> network.Network:
    eth = network.Interface("eth0", True, 9000, 100_000, "10.0.0.5")
    usual: dict = {
        "hostname": "n1", "resolved": ("10.0.0.5",), "interfaces": (eth,), "master": "n0",
        "master_resolved": ("10.0.0.4",), "source": "10.0.0.5", "addresses": frozenset({"10.0.0.5"}),
    }  # fmt: skip
    return network.Network(**usual | changed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"resolved": ()}, {"hostname": "fail"}),
        ({"resolved": ("127.0.1.1",)}, {"hostname": "warn"}),
        ({"master_resolved": ()}, {"MASTER_ADDR": "fail"}),
        ({"master_resolved": ("127.0.0.1",)}, {"MASTER_ADDR": "warn"}),
        (
            {"interfaces": (network.Interface("eth0", True, 1500, 1000, "10.0.0.5"),)},
            {"chosen interface": "warn"},
        ),
        (
            {"interfaces": (network.Interface("eth0", False, 1500, None, "10.0.0.5"),)},
            {"chosen interface": "fail"},
        ),
        (
            {"infiniband": (network.Port("mlx5_0:1", "DOWN", "400 Gb/sec", "InfiniBand"),)},
            {"InfiniBand": "warn"},
        ),
    ],
)
def test_names_and_interfaces_are_judged(changed: dict, expected: dict):
    assert wrong(network.judge(a_network(**changed), nodes=2)) == expected


def test_a_loopback_hostname_is_harmless_where_gloo_is_told_its_interface():
    found = network.judge(a_network(resolved=("127.0.1.1",)), nodes=2, interface_named=True)
    assert wrong(found) == {}


def test_interfaces_and_infiniband_are_read(tmp_path: Path):
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in (
        ("state", "4: ACTIVE"),
        ("rate", "400 Gb/sec (4X NDR)"),
        ("link_layer", "InfiniBand"),
    ):
        (port / name).write_text(text + "\n")
    assert network.read_infiniband(tmp_path / "infiniband") == (
        network.Port("mlx5_0:1", "ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand"),
    )
    own = {found.name: found for found in network.read_interfaces()}
    assert own["lo"].address == "127.0.0.1" and own["lo"].up


def test_a_port_in_use_is_told_and_one_that_answers():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        used = network.meeting_port("", port, under_launcher=False, seconds=1)[0]
        answers = network.meeting_port("127.0.0.1", port, under_launcher=True, seconds=1)[0]
    free = network.meeting_port("", port, under_launcher=False, seconds=1)[0]
    silent = network.meeting_port("127.0.0.1", port, under_launcher=True, seconds=1)[0]
    assert [one.verdict for one in (used, answers, free, silent)] == [WARN, OK, INFO, FAIL]


# -- clocks ---------------------------------------------------------------------------------------

SECONDS = st.floats(0, 5, allow_nan=False)


@given(st.floats(-1e4, 1e4), st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=8))
def test_the_clocks_offset_is_within_its_error(
    truth: float, ways: list[tuple[float, float, float]]
):
    exchanges, now = [], 1e5
    for there, work, back in ways:
        received = now + there + truth
        exchanges.append(clock.Exchange(now, received, received + work, now + there + work + back))
        now += there + work + back
    found = clock.estimate(exchanges)
    assert abs(found.seconds - truth) <= found.error + 1e-8
    assert found.error == pytest.approx(min(there + back for there, _, back in ways) / 2, abs=1e-8)


@pytest.mark.parametrize(
    ("seconds", "error", "verdict"),
    [(0.2, 0.001, OK), (1.5, 0.001, WARN), (-90.0, 0.1, WARN), (1.5, 0.8, OK)],
)
def test_a_clock_is_wrong_where_the_error_does_not_explain_it(seconds, error, verdict):
    assert clock.judge(clock.Offset(seconds, error)).verdict is verdict


# -- peers ----------------------------------------------------------------------------------------


@given(st.integers(1, 200))
def test_every_node_is_tried_and_tries_others(nodes: int):
    tried = {node: peers.partners(node, nodes) for node in range(nodes)}
    if nodes > 1:
        assert all(tried.values())
        assert {other for others in tried.values() for other in others} == set(range(nodes))
    assert all(node not in others for node, others in tried.items())
    assert sum(len(others) for others in tried.values()) <= nodes * max(15, nodes.bit_length() + 1)


def test_nodes_reach_each_other_and_a_wrong_token_does_not():
    server = peers.EchoServer(b"token")
    found = peers.reach(1, "127.0.0.1", server.port, b"token", 5)
    refused = peers.reach(1, "127.0.0.1", server.port, b"other", 5)
    server.close()
    assert not found.why and abs(found.offset.seconds) < 1 and found.milliseconds > 0
    assert refused.why


def test_a_silent_peer_is_named_in_time():
    with socket.create_server(("127.0.0.1", 0)) as deaf, socket.create_server(("", 0)) as gone:
        where, closed = deaf.getsockname()[1], gone.getsockname()[1]
        gone.close()
        began = time.monotonic()
        reached = peers.reach_all(
            {1: ("127.0.0.1", where), 2: ("127.0.0.1", closed)}, b"token", 0.5
        )
        assert time.monotonic() - began < 3
    found = peers.judge(reached, {1: "n1", 2: "n2"})
    assert wrong(found) == {"to n1": "fail", "to n2": "fail"}
    assert "timed out" in found[1].value and "refused" in found[2].value.lower()


def test_nodes_of_one_name_are_unique_names():
    assert unique_names({0: "a", 1: "b", 2: "a"}) == {0: "a (node 0)", 1: "b", 2: "a (node 2)"}


# -- versions -------------------------------------------------------------------------------------


def test_the_odd_node_is_named():
    same = {"torch": "2.13", "code": "aaa", "kernel": "6"}
    nodes = {f"n{number}": dict(same) for number in range(4)}
    nodes["n2"] |= {"code": "bbb"}
    found = versions.compare(nodes)
    assert wrong(found) == {"code": "fail"}
    says(found[0].value, "aaa", "n2", "bbb")
    assert "checkout" in found[0].remedy


@given(st.dictionaries(st.text("abc", min_size=1), st.sampled_from("xyz"), min_size=1))
def test_those_who_differ_are_never_more_than_those_who_agree_with_most(values: dict[str, str]):
    usual, odd = versions.odd_ones_out(values)
    alike = [node for node, value in values.items() if value == usual]
    assert len(alike) + len(odd) == len(values)
    for other in set(odd.values()):
        assert sum(value == other for value in odd.values()) <= len(alike)


# -- GPUs -----------------------------------------------------------------------------------------

SMI = """<?xml version="1.0" ?><nvidia_smi_log><driver_version>570.86</driver_version>
<gpu id="0"><product_name>NVIDIA H100</product_name><compute_mode>Default</compute_mode>
<mig_mode><current_mig>Disabled</current_mig></mig_mode>
<pci><pci_gpu_link_info><pcie_gen><max_link_gen>5</max_link_gen></pcie_gen><link_widths>
<current_link_width>16x</current_link_width></link_widths></pci_gpu_link_info></pci>
<fb_memory_usage><total>81559 MiB</total><used>1 MiB</used></fb_memory_usage>
<temperature><gpu_temp>{temperature} C</gpu_temp></temperature>
<clocks_event_reasons><clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
<clocks_event_reason_hw_thermal_slowdown>{slowed}</clocks_event_reason_hw_thermal_slowdown></clocks_event_reasons>
<ecc_errors><volatile><dram_correctable>7</dram_correctable><dram_uncorrectable>{errors}</dram_uncorrectable></volatile>
<aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate></ecc_errors>
<remapped_rows><remapped_row_pending>No</remapped_row_pending></remapped_rows>
<processes>{processes}</processes></gpu></nvidia_smi_log>"""
PROCESS = (
    "<process_info><pid>7</pid><type>C</type><process_name>python</process_name></process_info>"
)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"temperature": 91}, {"GPU 0": "warn"}),
        ({"slowed": "Active"}, {"GPU 0": "warn"}),
        ({"errors": 2}, {"GPU 0": "fail"}),
        ({"processes": PROCESS}, {"GPU 0": "warn"}),
    ],
)
def test_gpus_are_judged_by_what_nvidia_smi_says(changed: dict, expected: dict):
    usual = {"temperature": 41, "slowed": "Not Active", "errors": 0, "processes": ""}
    told = {"query": SMI.format(**usual | changed), "links": "", "kernel": ""}
    found = gpus.judge(told, ranks=1, required=True, kernel_files=True)
    assert wrong(found) == expected
    assert "NVIDIA H100 80 GiB, driver 570.86" in found[0].value
    assert gpus.compared(told) == {"driver": "570.86", "GPUs": "NVIDIA H100"}


@pytest.mark.parametrize(
    ("wanted", "files", "ranks", "expected"),
    [(False, False, 1, INFO), (True, False, 1, FAIL), (False, True, 1, WARN)],
)
def test_no_gpu_is_said_and_judged_by_what_the_run_wants(wanted, files, ranks, expected):
    none = {"query": "", "links": "", "kernel": ""}
    assert gpus.judge(none, ranks=ranks, required=wanted, kernel_files=files)[0].verdict is expected


def test_a_driver_that_fails_and_an_xid_are_told():
    failed = {"query": "", "links": "", "kernel": "", "failed": "No devices were found"}
    assert worst(gpus.judge(failed, ranks=1, required=False, kernel_files=True)) is FAIL
    usual = {"temperature": 41, "slowed": "Not Active", "errors": 0, "processes": ""}
    fell = {"query": SMI.format(**usual), "links": "", "kernel": "NVRM: Xid (PCI:0000:01:00): 79"}
    found = gpus.judge(fell, ranks=2, required=False, kernel_files=True)
    assert wrong(found) == {"GPUs": "fail", "XID in the kernel's log": "warn"}


# -- storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"kind": "tmpfs"}, {"run.dir": "warn"}),
        ({"kind": "overlay"}, {"run.dir": "warn"}),
        ({"free": 2 * GIB}, {"run.dir: space": "fail"}),
        ({"write": 12.0}, {"run.dir: writing": "warn"}),
        ({"error": "Read-only file system"}, {"run.dir: writing": "fail"}),
    ],
)
def test_a_run_folder_is_judged(changed: dict, expected: dict):
    usual = {
        "place": "/r",
        "kind": "nfs4",
        "free": 900 * GIB,
        "write": 800.0,
        "fsync": 0.1,
        "read": 900.0,
    }
    assert wrong(storage.judge_folder("run.dir", usual | changed, needed=10 * GIB)) == expected


def test_a_folders_file_system_is_measured_and_left_clean(tmp_path: Path):
    found = storage.measure({"folder": str(tmp_path / "not" / "yet"), "write": True})
    assert found["place"] == str(tmp_path) and found["free"] > 0 and found["kind"] != "unknown"
    assert found["write"] > 0 and found["read"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_mount_of_a_path_is_the_innermost(tmp_path: Path):
    table = tmp_path / "mounts"
    table.write_text("a / ext4 rw 0 0\nb /shared nfs4 rw 0 0\nc /shared/fast lustre rw 0 0\n")
    kinds = [
        storage.kind_of(Path(at), table)
        for at in ("/etc", "/shared/x", "/shared/fast/y", "/sharedx")
    ]
    assert kinds == ["ext4", "nfs4", "lustre", "ext4"]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ({"seen": 0}, {"seen": 40}, {}),
        ({"seen": -1}, {"seen": -1}, {"f": "fail"}),
        ({"seen": 0}, {"seen": 0}, {"f": "warn"}),
        ({"seen": 0, "waited": 8.0}, {"seen": 40}, {"f": "warn"}),
        ({"seen": 0}, {"seen": 40, "torn": 1}, {"f: renaming": "fail"}),
    ],
)
def test_what_other_nodes_see_is_judged(first: dict, last: dict, expected: dict):
    usual = {"waited": 0.1, "torn": 0}
    assert wrong(storage.judge_shared("f", usual | first, usual | last, 6.0)) == expected


def test_readers_of_a_replaced_file_meet_it_whole_and_of_a_rewritten_one_do_not(tmp_path: Path):
    path = tmp_path / "x" / "token"
    told = {"path": str(path), "first": 0, "versions": 30}
    writer = threading.Thread(target=storage.write_versions, args=(told,))
    writer.start()
    found = storage.await_version({"path": str(path), "version": 30, "seconds": 10.0})
    writer.join()
    assert found["seen"] == 30 and found[storage.TORN] == 0
    path.write_bytes(storage.content(5)[:-8])
    assert (
        storage.await_version({"path": str(path), "version": 5, "seconds": 0.0})[storage.TORN] == 1
    )
    storage.remove({"path": str(path)})
    assert list(tmp_path.iterdir()) == []


def test_sources_that_cannot_be_read_are_told(tmp_path: Path):
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "empty").mkdir()
    asked = [
        str(tmp_path),
        str(tmp_path / "clip.mp4"),
        str(tmp_path / "empty"),
        str(tmp_path / "no"),
    ]
    why = storage.source_reached({"sources": asked})
    assert why[:2] == ["", ""] and all(why[2:])
    assert [one.verdict for one in storage.judge_sources(asked, why)] == [OK, OK, FAIL, FAIL]


# -- bandwidth ------------------------------------------------------------------------------------


def test_bus_bandwidth_is_that_of_nccl_tests():
    assert bandwidth.busbw("all-reduce", 8e9, 2.0, 8) == pytest.approx(4e9 * 14 / 8)
    assert bandwidth.busbw("all-to-all", 8e9, 2.0, 8) == pytest.approx(4e9 * 7 / 8)


@given(st.integers(5, 40), st.data())
def test_the_rank_whose_links_are_slow_both_ways_is_named(ranks: int, data: st.DataObject):
    slow = data.draw(st.integers(0, ranks - 1))
    received = [data.draw(st.floats(0.8, 1.2)) for _ in range(ranks)]
    assert bandwidth.slow_ranks(received) == []
    for link in (slow, (slow + 1) % ranks):
        received[link] = 0.1
    assert bandwidth.slow_ranks(received) == [slow]


def test_a_rank_without_an_answer_is_named_and_a_slow_one():
    def row(kind: str, seconds: float) -> dict:
        return {"kind": kind, "bytes": 2**20, "seconds": seconds}

    names = {rank: f"n{rank // 2}" for rank in range(6)}
    whole = {
        rank: {
            "rows": [row("all-reduce", 0.1), row("neighbours", 1.0 if rank in (3, 4) else 0.1)],
            "backend": "gloo",
            "error": "",
        }
        for rank in names
    }
    assert wrong(bandwidth.judge(whole, names)) == {"rank 3 on n1": "warn"}
    lost = {rank: told for rank, told in whole.items() if rank != 5}
    assert wrong(bandwidth.judge(lost, names)) == {"bandwidth: rank 5 on n2": "fail"}


# -- deadlines ------------------------------------------------------------------------------------


def test_a_blocked_read_is_left_behind_in_a_thread_and_in_a_process(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    began = time.monotonic()
    with pytest.raises(LateError):
        within(0.3, pipe.read_bytes)
    with pytest.raises(LateError):
        apart(
            "sora_train.tools.doctor.checks.storage:await_version",
            {"path": str(pipe), "version": 0, "seconds": 0.1},
            1.5,
        )
    assert time.monotonic() - began < 8


def test_a_late_check_and_a_broken_one_are_findings_beside_the_others(tmp_path: Path):
    def broken() -> list[Finding]:
        raise OSError(5, "Input/output error", "/shared")

    began = time.monotonic()
    found = all_checked(
        [
            ("late", 0.4, lambda: time.sleep(60) or [], "drain the node"),
            ("broken", 5.0, broken, "-"),
            ("well", 5.0, lambda: [Finding("well", "yes")], "-"),
        ]
    )
    assert time.monotonic() - began < 5
    assert [(one.name, one.verdict) for one in found] == [
        ("late", FAIL),
        ("broken", WARN),
        ("well", OK),
    ]
    assert found[0].value == "no answer within 0.4 s" and found[0].remedy == "drain the node"
    assert "/shared" in found[1].value


def test_a_probe_answers_and_its_failure_is_told(tmp_path: Path):
    told = apart("sora_train.tools.doctor.checks.storage:measure", {"folder": str(tmp_path)}, 60)
    assert told["place"] == str(tmp_path)
    with pytest.raises(Fault, match="KeyError"):
        apart("sora_train.tools.doctor.checks.storage:measure", {}, 60)
    assert checked("x", 5, lambda: [Finding("x", "1")], "-") == [Finding("x", "1")]


# -- on paper -------------------------------------------------------------------------------------


def test_what_is_wrong_has_a_remedy():
    with pytest.raises(ValueError, match="without a remedy"):
        Finding("x", "1", WARN)


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_tells_all_within_the_width(width: int, tmp_path: Path):
    bad = Finding(
        "run.dir, shared: renaming", "3 times [half] a file", FAIL, "take another one " * 8
    )
    nodes = [NodeReport(f"n{number}", [Finding("a", "1"), bad]) for number in range(6)]
    report = Report(nodes, [Finding("nodes", "the same")], 12.0)
    with (tmp_path / "out").open("w") as file:
        show(report, Console(file=file, width=width))
    text = (tmp_path / "out").read_text()
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines[:-1])
    assert text.count("[half]") == 7 and len(re.findall("│ ok ", text)) == 2
    assert lines[-1].startswith("fail: ")
    says(lines[-1], "6 node(s)", "6 failure(s)", "0 warning(s)")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["verdict"] == "fail" and told["nodes"][3]["node"] == "n3"
    assert Finding.from_dict(told["nodes"][0]["findings"][1]) == bad


def test_a_process_is_ended_while_it_is_examined_and_not_thereafter():
    with ended_after(60, say=lambda: None):
        assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    until = time.monotonic() + 10
    while any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)
    hung = (
        "import time; from sora_train.tools.doctor.nodes.examination import ended_after\n"
        "with ended_after(0.1, lambda: print('hung', flush=True)): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", hung], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (EXIT_FAULT, "hung\n")
