"""All probes; `sora eval` asks each that fits the run."""

from sora_train.evaluation.probes.behind import BEHIND
from sora_train.evaluation.probes.bounce import BOUNCE
from sora_train.evaluation.probes.count import COUNT
from sora_train.evaluation.probes.probe import Probe

PROBES: tuple[Probe, ...] = (COUNT, BOUNCE, BEHIND)
