"""A SLURM cluster of two nodes on one machine: munge, the controller and two node daemons, in a folder of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/controller.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,requeue_delay=1
{nodes}
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000 State=UNKNOWN"
NODES = ("n1", "n2")


def missing() -> str:
    """Why no cluster can be started here, or an empty string."""
    lacking = [
        name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if lacking:
        return f"SLURM is not installed ({', '.join(lacking)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "node daemons of SLURM start jobs as root only"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Cluster:
    """Started by `with`. `env` is what SLURM's commands, and ours, find it by."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        host = socket.gethostname().partition(".")[0]
        for name in ("munge", "state", "log"):
            (self.folder / name).mkdir(parents=True)
        nodes = [NODE.format(name=name, host=host, port=free_port()) for name in NODES]
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=host,
                control_port=free_port(),
                user="root",
                folder=self.folder,
                nodes="\n".join(nodes),
            )
        )
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self.start(
            "munged",
            "--foreground",
            "--force",
            *(f"--{flag}={munge / name}" for flag, name in files.items()),
        )
        until((munge / "socket").exists, 20, "munge's socket")
        self.start("slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        until(
            lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", 60, "two idle nodes"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user=root", check=False)
        with contextlib.suppress(AssertionError):
            until(lambda: not self.run("squeue", "-h", check=False), 40, "end of the jobs")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start(self, name: str, *arguments: str, key: str = "") -> None:
        log = (self.folder / "log" / f"{key or name}.out").open("a")
        self.daemons[key or name] = subprocess.Popen(
            [name, *arguments], env=self.env, stdout=log, stderr=log
        )

    def start_node(self, node: str) -> None:
        self.start("slurmd", "-D", "-N", node, key=node)

    def kill_node(self, node: str) -> None:
        """As a node that loses its power: the daemon and all that it has started."""
        inside = [pid for pid in self.processes() if f"SLURMD_NODENAME={node}" in environment(pid)]
        # Steps' own daemons have left their parent, and are known by what they run.
        steps = {parent(pid) for pid in inside if name_of(parent(pid)).startswith("slurmstepd")}
        daemon = self.daemons[node]
        for pid in [daemon.pid, *steps, *inside]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def processes(self) -> list[int]:
        """All of this cluster's and of its jobs'."""
        told = f"SLURM_CONF={self.env['SLURM_CONF']}"
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if pid != os.getpid() and told in environment(pid)]

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, cwd=cwd
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The job's state as SLURM calls it: RUNNING, COMPLETED."""
        told = self.run("scontrol", "show", "job", job)
        return told.partition("JobState=")[2].split()[0]


def until(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until it holds; how long that took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"no {what} within {seconds:g} s"
        time.sleep(0.2)
    return time.monotonic() - began


def environment(pid: int) -> list[str]:
    """As the process was started with; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("PPid:")[2].split()[0])
