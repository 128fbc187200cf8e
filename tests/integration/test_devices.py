"""No tensor stays on the host among those of the device: the loss of a micro-batch and its gradients on fake tensors,
without a GPU. No value is computed; what is done for `cuda` alone (pinned copies, kernels of attention) is
not seen, nor are condition frames that are encoded apart, whose masks are read as numbers.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "device_worker.py"
DEVICE = "card:0"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    command = [sys.executable, str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "setting",
    [
        "given frames",
        "per token, frame rates",
        "padded as Wan",
        "stored",
    ],
)
def test_all_that_the_loss_is_made_of_lies_on_the_device(told: dict, setting: str):
    assert told[setting] == DEVICE


@pytest.mark.parametrize(
    "left",
    ["x", "noise", "t_B", "mask_BT", "fps_B"],
)
def test_a_tensor_that_stays_on_the_host_is_an_error(told: dict, left: str):
    """What the test above would say of code that forgets to move it."""
    assert "found at least two devices" in told[left] and "cpu" in told[left]
