"""How many wrong captions the clip ledger finds: some of the shapes world's are exchanged, and its list is counted.

    python -m benchmarks.ledger --judged 400 --out results/ledger

The quickstart's model is trained on 2,000 clips of which 5 % have another clip's caption (9 minutes on two idle cores),
and the ledger judges some of them, drawn by the seed.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sora_train.data.index.shapes_source import prepare_shapes
from sora_train.data.manifest import FILE_NAME, text_digest
from sora_train.data.shapes.world import IMAGE_SHARE


def plant(
    folder: Path, clips: int, share: float, seed: int = 0, image_share: float = IMAGE_SHARE
) -> tuple[Path, set[str]]:
    """A manifest below `folder` of the shapes world's training clips, and the keys of those with a wrong caption.

    A share of the clips is drawn, of the kind that most have, and each gives its caption to the next one drawn, as a
    shifted line of a caption file would.
    """
    manifest = prepare_shapes(
        folder, split="train", num_clips=clips, seed=seed, image_share=image_share
    )
    rng = np.random.default_rng([seed, 5])
    usual = "image" if image_share > 0.5 else "video"
    alike = np.flatnonzero(manifest.kind == usual)
    chosen = rng.permutation(alike)[: round(share * len(manifest))]
    caption = manifest.caption.copy()
    caption[chosen] = manifest.caption[np.roll(chosen, 1)]
    wrong = np.flatnonzero(caption != manifest.caption)
    digest = np.array([text_digest(text) for text in caption.tolist()], object)
    planted = folder / "planted" / FILE_NAME
    planted.parent.mkdir(parents=True, exist_ok=True)
    manifest.with_columns(caption=caption, caption_digest=digest).save(planted)
    return planted, set(manifest.key[wrong].tolist())


def found(table: Path, wrong: set[str], share: float = 0.1) -> tuple[int, int]:
    """How many of a ledger's wrong captions are in the first `share` of all its clips, and how many there are."""
    clips = pq.read_table(table, columns=["key", "mislabelled"]).to_pydict()
    keys = np.array(clips["key"])[np.argsort(-np.array(clips["mislabelled"]), kind="stable")]
    first = keys[: int(share * len(keys))].tolist()
    return len(wrong.intersection(first)), len(wrong.intersection(keys.tolist()))


def main() -> None:
    from sora_train.cli import run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--judged", type=int, default=400, help="clips that are judged; 0: all")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.05, help="of captions that are wrong")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    planted, wrong = plant(asked.out / "world", asked.clips, asked.share)
    folder = asked.out / "run"
    overrides = [
        "experiment=quickstart", f"run.dir={folder}", f"data.source={planted.parent}", "data.val_source=shapes",
        "validation.times=[0.5,0.7,0.9]", "sample.every=0", "sample.oracle_prompts=0", "checkpoint.keep_last=1",
    ]  # fmt: skip
    run(["train", *overrides])
    run(["data", "ledger", str(folder), "--clips", str(asked.judged)])
    (table,) = (folder / "ledger").glob("*.parquet")
    first, there = found(table, wrong)
    print(f"{first} of {there} wrong captions among the first tenth that is listed")


if __name__ == "__main__":
    main()
