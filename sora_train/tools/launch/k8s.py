"""A Kubernetes job: a JobSet with one pod a node, whose names are addresses.

https://jobset.sigs.k8s.io: the pods of one Job are completions 0 to N-1, and `<set>-node-0-0.<set>` is the first.
"""

import re
import shlex
import subprocess
from typing import Any

import yaml

from sora_train.errors import EXIT_REQUEUE, EXIT_USER, ConfigError, Fault
from sora_train.tools.launch.job import Job

PORT = 29500
GRACE = 600
"""Seconds between SIGTERM and SIGKILL of a pod; more than a checkpoint takes."""
RESTARTS = 100


def render(job: Job) -> str:
    """The manifest. Raises ConfigError where it lacks what a cluster needs."""
    require_cluster(job)
    cfg = job.cfg
    name = re.sub(r"[^a-z0-9-]+", "-", job.name.lower()).strip("-")[:40] or "sora"
    command = job.node_command(
        node='"$JOB_COMPLETION_INDEX"',
        address=f"{name}-node-0-0.{name}",
        port=str(cfg.port or PORT),
        logs=f'{shlex.quote(str(job.logs))}/"$HOSTNAME"',
    )
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container(job, command)],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": cfg.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    job_spec = {
        "parallelism": cfg.nodes,
        "completions": cfg.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # A mistake of the user's would be made again, so it ends the set too.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [EXIT_USER]}}
            ]
        },
        "template": {"spec": pod},
    }
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, **({"namespace": cfg.namespace} if cfg.namespace else {})},
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job_spec}}],
        },
    }
    comment = (
        f"# Exit code {EXIT_REQUEUE} (told to leave) and faults start all pods anew, from the last checkpoint on, "
        f"{RESTARTS} times.\n# Exit code {EXIT_USER} (a mistake in the configuration) ends the set.\n"
    )
    return comment + yaml.safe_dump(manifest, sort_keys=False)


def require_cluster(job: Job) -> None:
    """Raises ConfigError where an image, a volume or its path is missing."""
    cfg = job.cfg
    for key, meant in (
        ("image", "image of the ranks"),
        ("claim", "volume claim with run folders and clips"),
    ):
        if not getattr(cfg, key):
            raise ConfigError(f"launch.{key} is empty; name the {meant}")
    for folder, meant in ((job.run_dir, "the run folder"), (job.working_dir, "this folder")):
        if not folder.is_relative_to(cfg.mount):
            raise ConfigError(
                f"{meant} {folder} is outside launch.mount={cfg.mount}, which is all that pods see; start where the "
                "claim is mounted under that path, or set launch.mount"
            )


def container(job: Job, command: str) -> dict[str, Any]:
    """What runs on each node."""
    cfg = job.cfg
    gpus = job.ranks if cfg.gpus < 0 else cfg.gpus
    limits: dict[str, Any] = {"nvidia.com/gpu": gpus} if gpus else {}
    limits |= {"cpu": cfg.cpus} if cfg.cpus else {}
    limits |= {"memory": cfg.memory} if cfg.memory else {}
    return {
        "name": "ranks",
        "image": cfg.image,
        "workingDir": str(job.working_dir),
        "command": ["bash", "-c", "\n".join([*cfg.setup, f"exec {command}"])],
        "env": [{"name": key, "value": value} for key, value in job.environment().items()],
        "ports": [{"containerPort": cfg.port or PORT}],
        "resources": {"limits": limits, "requests": limits},
        "volumeMounts": [
            {"name": "work", "mountPath": cfg.mount},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def submit(manifest: str) -> str:
    """Hand it to kubectl; returns what that says. Raises Fault or ConfigError where it cannot be."""
    try:
        done = subprocess.run(
            ["kubectl", "apply", "-f", "-"],
            input=manifest,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise Fault(
            "there is no kubectl on this machine; take --print and apply the manifest where there is one"
        ) from None
    if done.returncode:
        raise ConfigError(f"Kubernetes refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
