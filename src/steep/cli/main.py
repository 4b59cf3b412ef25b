"""The command `steep`. This module and what it imports at the top stay light: `steep --help` answers in under 0.3 s.

Each command is a function in a file of its own that parses, calls and prints. Errors for people end here, as a message and
an exit code: 0 done, 1 failed, 2 usage or configuration, 128 and its number after a signal
(129 SIGHUP, 130 SIGINT, 143 SIGTERM).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import typer
import typer.core

import steep
from steep.cli import (
    average,
    blend,
    chat,
    config,
    demo,
    evaluate,
    export,
    generate,
    init,
    inspect,
    lr_find,
    plan,
    prepare,
    push,
    report,
    restore_instruct,
    schema,
    tokenizer,
    train,
)
from steep.cli.completion import config_keys
from steep.core.errors import ConfigError, SteepError
from steep.core.file_errors import explain_file_error
from steep.runtime.ranks import join_ranks

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""


def interrupted(error: KeyboardInterrupt) -> int:
    """Say so, and return the exit code: a run knows which signal stopped it, everything else is Ctrl-C."""
    print("interrupted", file=sys.stderr)
    return int(getattr(error, "exit_code", INTERRUPTED))


class Group(typer.core.TyperGroup):
    """The command line, which says that it is interrupted where no command runs yet: typer would print nothing."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        """Reads the command line."""
        with interruption_is_said():
            return super().make_context(*given, **named)

    def invoke(self, ctx: Any) -> Any:
        """What the command returns."""
        with interruption_is_said():
            return super().invoke(ctx)


@contextmanager
def interruption_is_said() -> Iterator[None]:
    """Ctrl-C inside ends the command line with a word."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise typer.Exit(interrupted(error)) from error


class Command(typer.core.TyperCommand):
    """A command that says when it is interrupted, where typer itself would return an exit code and print nothing.

    Raises ConfigError for overrides of a command without a configuration, which would ignore them silently.
    """

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The options that begin as typed, and keys for a command with a configuration."""
        offered = super().shell_complete(ctx, incomplete)
        if not any(parameter.name == "config" for parameter in self.params):
            return offered
        item = type(super().shell_complete(ctx, "--help")[0])  # typer's own class, which is not public
        return [*offered, *map(item, config_keys(incomplete))]

    def invoke(self, ctx: Any) -> Any:
        """What the command returns: an exit code, or None."""
        if ctx.obj and "config" not in ctx.params:
            raise ConfigError(
                f"steep {ctx.info_name} takes no configuration overrides, but was given {' '.join(ctx.obj)}"
            )
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            return interrupted(error)


app = typer.Typer(
    name="steep",
    cls=Group,
    help="Pretrain and continue to pretrain language models: raw text in, a servable checkpoint out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes longer to import than everything else together
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    init,
    config,
    prepare,
    plan,
    lr_find,
    train,
    evaluate,
    generate,
    chat,
    export,
    push,
    blend,
    average,
    restore_instruct,
    report,
    inspect,
    schema,
    demo,
):
    app.command(name=command.__name__.rpartition(".")[2].replace("_", "-"), cls=Command)(command.command)
tokenizer_app = typer.Typer(
    help="Measure whether a tokenizer fits a text, and extend it on the text.", no_args_is_help=True
)
for part in (tokenizer.fertility, tokenizer.extend):
    tokenizer_app.command(name=part.__name__, cls=Command)(part)
app.add_typer(tokenizer_app, name="tokenizer")


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", "-V", help="Print the version and exit.")) -> None:
    """Pretrain and continue to pretrain language models: raw text in, a servable checkpoint out."""
    if version:
        typer.echo(f"steep {steep.__version__}")
        raise typer.Exit
    join_ranks()  # one process for now, whatever the command


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        command_line: Any = typer.main.get_command(app)
        plain, overrides = split_overrides(arguments, options_of(command_line, arguments))
        result = command_line(args=plain, prog_name="steep", standalone_mode=False, obj=overrides)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except typer.Abort:
        return INTERRUPTED
    except SteepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        return interrupted(error)
    except BrokenPipeError:  # the reader of a pipe (head, less) has ended
        sys.stderr.close()
        return 0
    except Exception as error:
        file_error = explain_file_error(error)
        usage = usage_message(error)
        if file_error is not None:
            print(f"error: {file_error}", file=sys.stderr)
            return file_error.exit_code
        if usage is None:
            raise
        print(usage, end="\n" if usage else "", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


def options_of(command_line: Any, arguments: Sequence[str]) -> set[str] | None:
    """The options of the command that the arguments name, if it takes a configuration; None for any other."""
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    parameters = getattr(command_line.commands.get(name), "params", [])
    if not any(parameter.name == "config" for parameter in parameters):
        return None
    return {option for each in parameters for option in (*each.opts, *each.secondary_opts)} | {"--help"}


def split_overrides(arguments: Sequence[str], options: set[str] | None = None) -> tuple[list[str], list[str]]:
    """Split a command line into what typer parses and the overrides: `--a.b value`, `--a.b=value`, `--a.b`.

    An override takes the next argument as its value unless that begins with `--`.
    options: of a command with a configuration, for which `--name` is an override too (a whole section, or a key without its
    section, for which the configuration suggests the right one), unless it is an option or looks more like one than like a key.
    """
    plain: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if not (argument.startswith("--") and ("." in name or (options is not None and is_key(name, options)))):
            plain.append(argument)
            continue
        overrides.append(argument)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return plain, overrides


def is_key(argument: str, options: set[str]) -> bool:
    """Whether `--name` is probably meant as a section or key of the configuration, rather than as an option of the command."""
    if argument in options or argument == "--" or argument.replace("_", "-") in options:
        return False
    if get_close_matches(argument, options, n=1, cutoff=0.85):
        return False
    return argument[2:3].isalpha()


def usage_message(error: Exception) -> str | None:
    """What to print for a command line that typer could not parse; None for any other exception."""
    # typer has its own copy of click since 0.20 and used the package before; this finds the class in both.
    click_exception = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    if not isinstance(error, click_exception):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "steep"
    message: str = error.format_message()  # type: ignore[attr-defined]
    return f"{path}: {message}\nTry '{path} --help'." if message else ""  # no message: the help was shown


def main() -> int:
    """Run the command line of this process and return its exit code. `steep.__main__` is the way in."""
    if (
        not sys.stderr.isatty()
    ):  # progress bars of other libraries would fill a log with control codes: tqdm's own switch
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for them takes a fifth of the start-up time
    return run(sys.argv[1:])
