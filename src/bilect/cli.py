"""Command line: parse, call one function, set the exit code."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bilect import __version__
from bilect.errors import BilectError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Choose training data for language models by bilevel optimisation.",
)

Out = Annotated[Path, typer.Option("--out", help="Run directory; an unfinished run there goes on.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bilect {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Another seed, another run.")] = 0,
) -> None:
    """BLISS on real text, in minutes, on a CPU: selected against random data at equal tokens."""
    from bilect.demo import run_demo

    run_demo(out, seed)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file, see examples/.")],
    out: Out,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value; repeatable.")] = None,
) -> None:
    """Carry out a run, or what is left of it."""
    from bilect.terminal import run_with_progress

    run_with_progress(config, out, overrides or [])


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write report.html of a run again."""
    from bilect.report import write_report

    if not (run_dir / "run.json").is_file():
        raise BilectError(f"report: {run_dir} is not a run directory (no run.json)")
    typer.echo(str(write_report(run_dir)))


def main() -> None:
    """Entry point: a ``BilectError`` is one line on stderr and exit code 2."""
    try:
        app()
    except BilectError as error:
        print(f"bilect: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bilect: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
