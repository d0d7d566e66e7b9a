"""``python -m bilect.cli``, as ``torchrun -m bilect.cli`` needs it; ``python -m bilect`` is the same."""

from bilect.cli.commands import main

if __name__ == "__main__":
    main()
