"""docs/prep.md: its stage of one's own works, and the table names every stage."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_prep.command import prepare
from data_prep.pipeline import ORDER
from sora_train.data.decode.video_io import encode_h264

PAGE = (Path(__file__).parents[2] / "docs/prep.md").read_text()


def test_the_stage_of_the_page_runs(tmp_path: Path):
    code = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "outdoors.py").write_text(code)
    (tmp_path / "footage").mkdir()
    for name in ("garden.mp4", "kitchen.mp4"):
        moving = np.arange(20)[:, None, None, None] * 5 + np.arange(48)[:, None]
        frames = np.broadcast_to(moving % 255, (20, 32, 48, 3)).astype(np.uint8)
        encode_h264(np.ascontiguousarray(frames), 8, tmp_path / "footage" / name)
    prepare([f"input={tmp_path / 'footage'}", f"output={tmp_path / 'out'}", f"stages=[{tmp_path / 'outdoors.py'}]",
             "outdoors.word=garden", "until=outdoors", "workers=1", "scenes.detector=difference", "cut.min_seconds=1",
             "score.text=false", "score.faces=false", "score.nsfw=false", "score.brisque=false"])  # fmt: skip
    stages = tmp_path / "out/prep/stages"
    results = [pq.read_table(path) for path in (stages / "outdoors").rglob("*.parquet")]
    fates = {(one["is_outdoors"][0].as_py(), one["drop_reason"][0].as_py()) for one in results}
    assert fates == {(True, ""), (False, "indoors")}


def test_the_page_names_every_stage():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    named = [name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert [name for name in named if name in ORDER] == list(ORDER)
