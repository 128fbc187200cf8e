"""`python -m sora_train` is the command `sora`."""

from sora_train.cli import main

if __name__ == "__main__":
    main()
