"""One question in a process of its own; started by deadline.py, without torch.

python -m sora_train.tools.doctor.nodes.probe MODULE:FUNCTION ARGUMENT-AS-JSON
"""

import importlib
import json
import sys


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    found = getattr(importlib.import_module(module), function)(json.loads(sys.argv[2]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
