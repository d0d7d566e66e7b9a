"""``python -m bilect``: the command line."""

from bilect.cli.commands import main

if __name__ == "__main__":
    main()
