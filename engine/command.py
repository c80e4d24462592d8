"""What the verbs of the command line have in common: options, exit codes, and how a run ends."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Any

import typer

from engine.console import Output, say


class Exit(IntEnum):
    """What the exit codes mean."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    QUARANTINED = 3
    INTERRUPTED = 130


Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="a shipped recipe or a path that ends in .yaml")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="set keys of the recipe")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout; all else goes to stderr")]
Local = Annotated[bool, typer.Option("--local", help="run in processes of this machine, without Ray")]
Address = Annotated[str | None, typer.Option(help="run on a Ray cluster that is already there")]


def _keys_of(verb: str) -> Callable[[bool], None]:
    def show(wanted: bool) -> None:
        if wanted:
            from engine.keys import describe_keys

            typer.echo(describe_keys(verb))
            raise typer.Exit

    return show


def keys_option(verb: str) -> Any:
    """The option `--keys` of a verb that takes a recipe."""
    return typer.Option("--keys", is_eager=True, callback=_keys_of(verb), help="list the recipe's keys and stop")


outputs: list[Output] = []  # the real stdout, while a verb runs


def guard(
    work: Callable[[], tuple[dict[str, Any], str]], *, go_on: str = "run the same command again to go on"
) -> tuple[dict[str, Any], str, Exit]:
    """Run a verb; a mistake of the user or a failure of the run becomes one sentence and an exit code.

    Anything else is our own error and keeps its traceback.
    """
    from engine.errors import sentence

    try:
        result, text = work()
    except KeyboardInterrupt as stop:
        say(f"engine: {str(stop) or 'interrupted'}; {go_on}")
        return {}, "", Exit.INTERRUPTED
    except Exception as error:
        found = sentence(error)
        if found is None:
            raise
        text, usage = found
        say(f"engine: {text}")
        return {}, "", Exit.USAGE if usage else Exit.FAILED
    return result, text, Exit.DONE


def finish(result: dict[str, Any], text: str, code: Exit, json: bool) -> None:
    """Print what `guard` returned, as text or as one JSON object, and exit with its code."""
    if result:
        if json:
            outputs[-1].json(result)
        else:
            outputs[-1].print(text)
    raise typer.Exit(int(code))
