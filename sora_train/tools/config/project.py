"""`sora init NAME`: a project of one's own in two short files, a Recipe and an experiment."""

import keyword
import os
import shlex
import shutil
from pathlib import Path

from sora_train.errors import UserError

TRAIN = '''"""{title}: run it with `sora train {folder}/train.py {folder}/my.yaml key=value`."""

from sora_train import Config, Recipe
from sora_train.train import main


class MyConfig(Config):
    """Keys of your own go here with their defaults, `note: str = ""`, and are set with note=..."""


# A builder for each part that is your own: model, objective, data, callbacks, validate, sample (docs/extend.md).
recipe = Recipe(config=MyConfig)

if __name__ == "__main__":
    main(recipe)
'''

YAML = """# {title}: an experiment of your own. `defaults` names what it starts from; below are the keys it changes.
defaults:
  - quickstart                   # or real_tiny, for clips of your own
  - override /model: tiny_t2v
  - override /buckets: shapes
name: "{name}"
run: {{dir: "runs/{name}"}}
data: {{source: shapes}}           # or a folder of clips, shards or a table
train: {{steps: 900}}
sample: {{prompts: ["red circle moves left", "blue square rotates"]}}
"""

README = """# {title}

    sora config show {folder}/my.yaml
    sora train {folder}/train.py {folder}/my.yaml
    sora sample --ckpt runs/{name} --prompt "red circle moves left"

`train.py` says what is your own; `my.yaml` chooses values. Every key: `sora config explain KEY`.
"""


def create(folder: Path) -> str:
    """Write the project and return what to do next. UserError if the folder is there already or has no usable name."""
    name = folder.name
    if not name.replace("-", "_").isidentifier() or keyword.iskeyword(name):
        raise UserError(
            f"'{name}' is no name for a project; use letters, digits and underscores, for example my_project"
        )
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another name or remove it")
    words = {
        "title": name.replace("_", " ").replace("-", " "),
        "name": name,
        "folder": folder.as_posix(),
    }
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, text in (("train.py", TRAIN), ("my.yaml", YAML), ("README.md", README)):
        (partial / file).write_text(text.format(**words))
    os.replace(partial, folder)
    own, config = shlex.quote(f"{folder}/train.py"), shlex.quote(f"{folder}/my.yaml")
    return f"wrote {folder}/train.py, my.yaml and README.md\nnext: sora train {own} {config}"
