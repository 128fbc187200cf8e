"""A trained run behind `sora serve`, with everything switched on: asked by OpenAI's client, signed, marked, billed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from sora_train.serving.provenance.verdict import verdict

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_is_served_signed_and_extended(finished_run: Path, tmp_path: Path):
    data = tmp_path / "data"
    flags = ["--port", "0", "--data", str(data), "--dev-cert", "test"]
    command = [sys.executable, "-m", "sora_train", "serve", "--ckpt", str(finished_run), *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        address = re.search(r"http://127.0.0.1:\d+", server.stdout.readline())[0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", timeout=60)
        made = client.videos.create_and_poll(
            prompt="red circle moves left", extra_body={"steps": 2}
        )
        assert made.status == "completed", made.error
        assert made.provenance == {"signed": True, "watermark": True}
        file = tmp_path / "made.mp4"
        client.videos.download_content(made.id).write_to_file(file)
        by_id = {"video": {"id": made.id}, "steps": 2}
        seconds = made.seconds
        longer = client.videos.extend(
            prompt="a", seconds=seconds, video=openai.omit, extra_body=by_id
        )
        longer = client.videos.poll(longer.id)
        assert longer.status == "completed", longer.error
        assert float(longer.seconds) > float(made.seconds)
        assert longer.usage["seconds"] == pytest.approx(
            float(longer.seconds) - float(made.seconds), abs=0.01
        )
        both = tmp_path / "longer.mp4"
        client.videos.download_content(longer.id).write_to_file(both)
        anchors = (data / "dev_certs" / "test" / "anchors.pem").read_text()
        told = [verdict(path, anchors) for path in (file, both)]
        assert [one.state for one in told] == ["Trusted", "Trusted"]
        assert told[1].parents, "the extension names the video that it extends"
        server.send_signal(signal.SIGTERM)
        assert server.wait(200) == 0
    finally:
        server.kill()
