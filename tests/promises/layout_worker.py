"""Run under torchrun by test_layout_invariance: trains one cell of the table after another in one process group.

Arguments: a folder, then one JSON list of overrides a cell. Each cell writes metrics.jsonl into FOLDER/cell-N.
"""

import json
import sys

import torch.distributed as dist

from sora_train.config.compose import compose
from sora_train.training.trainer import Trainer


def main() -> None:
    folder, *cells = sys.argv[1:]
    dist.init_process_group("gloo")
    for number, cell in enumerate(cells):
        overrides = [f"run.dir={folder}/cell-{number}", *json.loads(cell)]
        Trainer(compose(["experiment=parity_tiny", *overrides]).config).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
