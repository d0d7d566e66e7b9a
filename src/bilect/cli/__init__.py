"""The command line: commands parse, screens show. The entry point is ``bilect.cli.commands.main``."""
