"""Promise 7: the model never knows it is distributed. tests/test_layering.py checks every import.

This checks what imports cannot show: no name of the distributed world is used, no process group is asked for.
"""

import ast
from pathlib import Path

import pytest
import torch

from sora_train.config.compose import compose
from sora_train.diffusion.flow import velocity_losses
from sora_train.models.text_to_video import TextToVideo

PACKAGE = Path(__file__).resolve().parents[2] / "sora_train"
FILES = sorted([*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "diffusion").glob("*.py")])
FOREIGN = set(
    [
        "distributed",
        "DTensor",
        "DeviceMesh",
        "FSDPModule",
        "fully_shard",
        "all_reduce",
        "RANK",
        "WORLD_SIZE",
    ]
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_name_of_the_distributed_world(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = {node.value}
        assert not names & FOREIGN, f"{path.name} line {node.lineno}: {names & FOREIGN}"


def test_model_and_loss_ask_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model asked about ranks")

    for name in ("get_rank", "get_world_size", "is_initialized", "all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    cfg = compose(["experiment=parity_tiny"]).config
    model = TextToVideo(cfg.model, cfg.text, seed=0)
    x = torch.randn(1, 16, 2, 4, 4)
    v = model(x, torch.full((1, 2), 0.5), model.tokenize(["red"]), mask_BT=torch.zeros(1, 2))
    velocity_losses(v, x, torch.zeros_like(x), torch.ones(1, 2))[0].sum().backward()
