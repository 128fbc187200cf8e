"""What is known of a job before anything of it starts: its ranks fit the layout, and its weights are here."""

from sora_train.config import Config
from sora_train.config.job import JobConfig
from sora_train.errors import ConfigError
from sora_train.models.hub import absent, weights_named
from sora_train.parallel.degrees import check_degrees, resolve_degrees
from sora_train.tools.launch.local import ranks_here


def check_job(job: JobConfig) -> None:
    """Raises ConfigError where this run, or one of its stages, cannot be what `launch.*` says."""
    for cfg in job.runs:
        check_ranks(cfg, job.config)
        if job.config.launch.offline:
            check_weights(cfg)


def check_ranks(cfg: Config, whole: Config) -> None:
    ranks, nodes = ranks_here(whole.launch), whole.launch.nodes
    try:
        check_degrees(cfg, resolve_degrees(cfg.parallel, ranks * nodes))
    except ConfigError as error:
        raise ConfigError(f"launch.nodes={nodes} of {ranks} rank(s) each: {error}") from error


def check_weights(cfg: Config) -> None:
    """Models of the hub that the job would have to fetch, which it may not."""
    for named in weights_named(cfg):
        why = absent(named)
        if why:
            raise ConfigError(
                f"{named.key}={named.path}: {why}, and with launch.offline=true the job fetches nothing; run `sora "
                "fetch` with the same arguments where there is a network, or set launch.offline=false"
            )
