"""Command line: parse, call one function, set the exit code."""

import json
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bilect import __version__
from bilect.cli.output import Result, shown
from bilect.errors import BilectError, explain
from bilect.runtime.interrupts import Interrupted, ends_promptly
from bilect.runtime.terminal import any_terminal, printable

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Choose training data for language models by bilevel optimisation.",
    epilog="Start with `bilect demo`, or `bilect choose POOL --target FILE --out DIR`. "
    "Completion: `bilect --install-completion`.",
)


class _Size(StrEnum):
    tiny = "tiny"
    paper = "paper"


class _Method(StrEnum):
    blade = "blade"
    rho1 = "rho1"
    random_token = "random-token"
    full = "full"


class _Format(StrEnum):
    parquet = "parquet"
    jsonl = "jsonl.zst"


class _Output(StrEnum):
    records = "records"
    text = "text"


Source = Annotated[Path, typer.Argument(help="Config (YAML, see `bilect init`), or a run directory.", metavar="CONFIG")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run directory; an unfinished run there goes on. Default: CONFIG, if it is one."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Setting as key.path=value; repeatable.", metavar="KEY=VALUE")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the plan: tokens, FLOPs, time. Writes nothing.")]
Yes = Annotated[
    bool, typer.Option("--yes", help="Repeat stages of a finished run whose settings or inputs have changed.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes for tokenising, scoring and records; default 1.")]
Engine = Annotated[
    str | None, typer.Option(help="Where these run: local (this machine) or ray, see docs/howto/ray.md.")
]


def _share(text: str) -> float:
    """A share as people type it; what is meant otherwise is told in the words of the command line."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise BilectError(f"--keep {text}: expected a share of the tokens, more than 0 and at most 1, such as 0.2 for "
                          "20%; a number of tokens is given by --tokens, of documents by --top-k")  # fmt: skip
    return share


Keep = Annotated[
    float | None,
    typer.Option(parser=_share, metavar="SHARE", help="Share of the tokens to keep; default: the run's, else 0.2."),
]
Tokens = Annotated[str | None, typer.Option(help="Tokens to keep: 25M, 1.5B, 300k or a number.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Documents to keep.")]
Round = Annotated[
    int | None, typer.Option("--round", help="Of which round; default: the first that is not trained yet.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from bilect.runtime.revision import git_revision

        revision = git_revision()
        typer.echo(f"bilect {__version__}" + (f" ({revision[:12]})" if revision else ""))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory; an unfinished run there goes on.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Another seed, another run.")] = 0,
    yes: Yes = False,
) -> None:
    """A choice from real text, in minutes, on a CPU: selected against random data at equal tokens."""
    from bilect.cli.screens import show_demo

    show_demo(out, seed, repeat=yes)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="New config file.")] = Path("bilect.yaml"),
    pool: Annotated[list[str] | None, typer.Option(help="File, folder, glob or URL of the pool; repeatable.")] = None,
    upper: Annotated[list[str] | None, typer.Option(help="Target set: what good means; repeatable.")] = None,
    heldout: Annotated[list[str] | None, typer.Option(help="Held-out set, for reporting; repeatable.")] = None,
    size: Annotated[_Size, typer.Option(help="tiny: minutes on a CPU; paper: 31M proxy, 410M target.")] = _Size.tiny,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for these, and look at once whether the answers can be used.")
    ] = False,
) -> None:
    """Write a commented config to start from."""
    from bilect.config.template import check_new, starting_values, write_template

    roles = pool or ["data/pool/"], upper or ["data/upper.jsonl"], heldout or ["data/heldout.jsonl"]
    check_new(file)  # before anything is asked
    if interactive:
        from bilect.cli.questions import ask_settings

        values = ask_settings(roles[0][0], roles[1][0], roles[2][0], size.value)
    else:
        values = starting_values(*roles, size.value)
    write_template(file, values)
    typer.echo(f"{file}: edit it, then `bilect run {file} --out runs/{file.stem} --dry-run`")


@app.command()
@shown
def choose(
    pool: Annotated[list[str], typer.Argument(help="Files, folders, globs, URLs: the candidates.", metavar="POOL...")],
    target: Annotated[list[str], typer.Option(help="Examples that say what good means; repeatable.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the result; an unfinished one there goes on.")],
    keep: Keep = None,
    tokens: Tokens = None,
    top_k: TopK = None,
    method: Annotated[str | None, typer.Option(help="What to choose by, see docs/methods.md.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or Hub name of a causal LM to judge with; default: a small one, trained here."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    overrides: Overrides = None,
    workers: Workers = None,
    engine: Engine = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Result:
    """Choose the part of a pool to train on: records as they came, scores, and a report. Nothing else is trained."""
    from bilect.cli.choosing import choose_with_progress
    from bilect.pipeline.reuse import selection_settings

    amount = selection_settings(keep_ratio=keep, budget_tokens=tokens, top_k=top_k)
    settings = _with(overrides, workers, engine)
    return choose_with_progress(pool, target, out, amount, method, model, seed, settings, dry_run, yes)


@app.command()
@shown
def run(
    config: Source,
    out: Out = None,
    overrides: Overrides = None,
    workers: Workers = None,
    engine: Engine = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Result:
    """Carry out a run, or what is left of it."""
    return _carry_out("run", config, out, _with(overrides, workers, engine), None, dry_run, yes)


@app.command()
@shown
def warmup(
    config: Source,
    out: Out = None,
    overrides: Overrides = None,
    workers: Workers = None,
    engine: Engine = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Result:
    """Tokenise, and train proxy and target on random documents."""
    return _carry_out("warmup", config, out, _with(overrides, workers, engine), None, dry_run, yes)


@app.command()
@shown
def fit(
    config: Source,
    out: Out = None,
    number: Round = None,
    overrides: Overrides = None,
    workers: Workers = None,
    engine: Engine = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Result:
    """Fit the score model of a round (and what it needs)."""
    return _carry_out("fit", config, out, _with(overrides, workers, engine), number, dry_run, yes)


@app.command()
@shown
def export(
    selection: Annotated[
        Path, typer.Argument(help="A run, or the folder of a selection (kept.parquet or kept.jsonl.zst).")
    ],
    to: Annotated[str, typer.Option("--to", help="doc-ids, hf-datasets, jsonl-zst, litdata, mds, megatron, parquet.")],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    tokens: Annotated[
        Path | None, typer.Option(help="Folder with pool.json, where the selection does not lie in its run.")
    ] = None,
) -> Result:
    """Write the kept documents in the format of a trainer."""
    from bilect.pipeline.exporting import export as write

    figures = write(selection, to, out, tokens=tokens)
    typer.echo(f"{out}: {figures['documents']:,} documents, {figures['tokens']:,} tokens")
    return {"out": out, "format": to, **figures}


@app.command()
@shown
def score(
    config: Source,
    out: Out = None,
    number: Round = None,
    overrides: Overrides = None,
    workers: Workers = None,
    engine: Engine = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Score these files instead, with the score model of the run CONFIG; results go to --out."),
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="With --data: NAME=FIELD, such as text=content; repeatable.")
    ] = None,
) -> Result:
    """Score the shard of a round, or other files with the score model of a finished run."""
    if data:
        from bilect.cli.screens import score_with_progress

        return score_with_progress(config, data, _needed(out, "score --data"), field or [], yes, workers, engine)
    return _carry_out("score", config, out, _with(overrides, workers, engine), number, dry_run, yes)


@app.command()
@shown
def select(
    source: Annotated[
        Path,
        typer.Argument(help="Run directory or folder of score files; or a config: then --out is its run directory."),
    ],
    keep: Keep = None,
    tokens: Tokens = None,
    top_k: TopK = None,
    temperature: Annotated[float | None, typer.Option(help="Of Gumbel noise on the scores; 0: the plain top.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    min_share: Annotated[list[str] | None, typer.Option(help="SOURCE=SHARE, at least; repeatable.")] = None,
    max_share: Annotated[list[str] | None, typer.Option(help="SOURCE=SHARE, at most; '*' for all others.")] = None,
    max_per_cluster: Annotated[
        int | None, typer.Option(help="Documents to keep of each cluster of near-duplicates.")
    ] = None,
    file_format: Annotated[_Format | None, typer.Option("--format", help="Of the table of kept documents.")] = None,
    output: Annotated[
        _Output | None,
        typer.Option("--output", help="records: also the kept records as they came; text: the table alone."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; default: RUN/selections/NAME.")] = None,
    number: Annotated[int | None, typer.Option("--round", help="Scores of which round; default: the last.")] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    engine: Engine = None,
    yes: Yes = False,
) -> Result:
    """Keep another share, budget or mix from scores that are there: no new scoring."""
    from bilect.cli.screens import select_with_progress
    from bilect.pipeline.reuse import selection_settings

    settings = selection_settings(
        keep_ratio=keep,
        budget_tokens=tokens,
        top_k=top_k,
        temperature=temperature,
        min_share=min_share,
        max_share=max_share,
        max_per_cluster=max_per_cluster,
        format=None if file_format is None else file_format.value,
        output=None if output is None else output.value,
    )
    if source.is_dir():
        return select_with_progress(source, out, settings, number, seed, yes, workers, engine)
    pairs = [f"selection={settings}"] if settings else []
    return _carry_out("select", source, out, [*pairs, *_with(overrides, workers, engine)], number, False, yes)


@app.command()
@shown
def train(
    config: Source,
    out: Out = None,
    number: Round = None,
    method: Annotated[
        list[_Method] | None,
        typer.Option(help="Train on the full pool instead, with tokens chosen so, and evaluate; repeatable."),
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Result:
    """Train the target, and its controls, on the documents of a round; or compare ways to choose tokens (--method)."""
    return _carry_out("train", config, out, overrides, number, dry_run, yes, [m.value for m in method or []])


@app.command("eval")
@shown
def evaluate(
    config: Source,
    out: Out = None,
    number: Round = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Result:
    """Held-out losses of the targets of a round."""
    return _carry_out("eval", config, out, overrides, number, dry_run, yes)


@app.command()
@shown
def compare(
    config: Annotated[
        Path, typer.Argument(help="Config (YAML) of a run with what to compare as its controls; or `demo`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder; an unfinished comparison there goes on.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Result:
    """Every method over several seeds at equal tokens: gains with their intervals, costs, learning curves, overlap."""
    from bilect.cli.screens import compare_with_progress, plan_comparison

    if dry_run:
        return plan_comparison(config, out, overrides or [])
    return compare_with_progress(config, out, overrides or [], repeat=yes)


@app.command()
@shown
def verify(
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="Folder of the results.")],
    quick: Annotated[bool, typer.Option("--quick", help="The short form.")] = False,
    retrain: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Instead: do scores predict what retraining on this config's pool does?"),
    ] = None,
    subsets: Annotated[int | None, typer.Option(help="With --retrain: halves to train on; default 64.")] = None,
    candidates: Annotated[int | None, typer.Option(help="With --retrain: documents; default 256.")] = None,
    seeds: Annotated[int | None, typer.Option(help="With --retrain: fits of every method; default 1.")] = None,
    workers: Annotated[int | None, typer.Option(help="With --retrain: processes; default: one per core.")] = None,
    overrides: Overrides = None,
) -> tuple[Result, int]:
    """Every estimator against the exact answer, on problems small enough to have one; exit code 1 if a claim fails."""
    sizes = {"subsets": subsets, "candidates": candidates, "seeds": seeds, "workers": workers}
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if retrain is None:
        if given or overrides:
            raise BilectError(f"verify: --{next(iter(given), 'set')} belongs to --retrain CONFIG, which is missing")
        from bilect.verify import run_verify

        code = run_verify(out, quick)
        return _read(out / "verify.json"), code
    if quick:
        raise BilectError("verify: --quick and --retrain are two studies; give one of them")
    from bilect.config import load_config
    from bilect.verify.retraining import run_retraining

    run_retraining(load_config(retrain, overrides or []), out, **given)
    return _read(out / "retrain.json"), 0


@app.command()
@shown
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directory; several are compared on one page.", metavar="RUN...")
    ],
    export: Annotated[
        str | None, typer.Option("--export", help="csv, png or svg: write every plot of one run into --out instead.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="With --export or several runs: folder of the result.")
    ] = None,
) -> Result:
    """Write report.html of a run again; or its plots as files; or one page that compares several runs."""
    from bilect.cli.screens import write_pages

    return {"files": write_pages(runs, export, out)}


@app.command()
def watch(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    port: Annotated[int, typer.Option(help="Of the page; default: a free one.")] = 0,
) -> None:
    """Serve the report of a run on this machine while the run goes on; Ctrl-C ends it."""
    from bilect.report.watch import serve

    serve(run_dir, port, lambda url: typer.echo(f"{url}   (Ctrl-C ends it)"))


@app.command()
@shown
def tasks(
    models: Annotated[
        list[str], typer.Argument(help="Directories, Hub names or .gguf files; the others are compared with the first.")
    ],
    task: Annotated[list[str], typer.Option("--task", help="Task file or name that lm-eval knows; repeatable.")],
    limit: Annotated[int | None, typer.Option(min=1, help="First examples of each task; default: all.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Greatest input, tokens; default: what each model takes.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where: auto, cpu, cuda, cuda:1 ...")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> Result:
    """Saved models on downstream tasks, compared example by example."""
    from bilect.cli.evaluating import show_tasks

    return show_tasks(models, task, limit, context, device, out)


@app.command()
@shown
def doctor(
    folder: Annotated[Path, typer.Argument(help="Where results are to be written.", metavar="[FOLDER]")] = Path(),
) -> tuple[Result, int]:
    """What works on this machine, and what to install or do; exit code 1 if something that is required does not."""
    from bilect.cli.looking import show_machine

    return show_machine(folder)


@app.command()
@shown
def inspect(
    path: Annotated[Path, typer.Argument(help="Run directory, scores, selection, model or checkpoint (.pt).")],
) -> Result:
    """What lies at a path, what is in it, and the command that takes it further."""
    from bilect.cli.looking import show_content

    return show_content(path)


def _carry_out(
    command: str,
    source: Path,
    out: Path | None,
    overrides: list[str] | None,
    number: int | None,
    dry_run: bool,
    yes: bool,
    arms: Sequence[str] = (),
) -> Result:
    from bilect.cli.screens import plan_on_screen, run_with_progress

    if source.is_dir():
        if not (source / "config.yaml").is_file():
            raise BilectError(f"{command}: {source} is not a run directory (no config.yaml)")
        source, out = source / "config.yaml", out or source
    elif not source.exists():
        raise BilectError(f"config: cannot read {source}: No such file or directory; give a config, as `bilect init` "
                          "writes, or a run directory")  # fmt: skip
    folder = _needed(out, command)
    if dry_run:
        return plan_on_screen(source, folder, overrides or [], arms)
    return run_with_progress(source, folder, overrides or [], command=command, number=number, arms=arms, repeat=yes)


def _read(file: Path) -> Result:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _with(overrides: list[str] | None, workers: int | None, engine: str | None) -> list[str]:
    """The settings, ``--workers`` and ``--engine`` among them."""
    given = {"workers": workers, "engine": engine}
    return [*(f"{name}={value}" for name, value in given.items() if value is not None), *(overrides or [])]


def _needed(out: Path | None, command: str) -> Path:
    if out is None:
        raise BilectError(f"{command}: --out DIR is missing (where the run is written)")
    return out


def _misused(error: Exception) -> str | None:
    """One line for a command that cannot be parsed, or whose questions were not answered; None for other errors."""
    if isinstance(error, typer.Abort):
        return "stopped; nothing was written"
    if not hasattr(error, "format_message"):  # of all errors in the use of a command, under any version of typer
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "bilect"
    return f"{error.format_message().rstrip('.')} (`{command} --help` lists what there is)"


def main() -> None:
    """Entry point: what the user can put right is one line on stderr and exit code 2."""
    any_terminal()
    interrupted = "bilect: interrupted; the same command goes on from here"
    try:
        with ends_promptly(interrupted):
            code = app(None if sys.argv[1:] else ["--help"], standalone_mode=False)
        if code:
            sys.exit(code)
    except Interrupted as error:
        print(interrupted, file=sys.stderr, flush=True)
        os._exit(error.code)  # now: threads and processes of libraries are not waited for
    except Exception as error:
        message = _misused(error) or explain(error)
        if message is None:
            raise
        print(f"bilect: {printable(message)}", file=sys.stderr)
        sys.exit(2)
