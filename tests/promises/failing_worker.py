"""Run under torchrun by test_no_hang: `sora train` with a trainer whose second rank fails after its first step."""

from sora_train.errors import Fault
from sora_train.train import main
from sora_train.training.trainer import Trainer


class FailingTrainer(Trainer):
    def callbacks(self):
        def fail(trainer: Trainer, row: dict[str, float]) -> None:
            if trainer.world.rank == 1:
                raise Fault("this rank was told to fail")

        return [fail]


if __name__ == "__main__":
    main(FailingTrainer)
