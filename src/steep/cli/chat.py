"""`steep chat`: talk to a model in the terminal, or have it served."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Optional

import typer

from steep.cli.options import ALLOW_CODE, DEVICE, MODEL
from steep.cli.packages import prepare_imports
from steep.cli.wrap import Wrapped
from steep.core.errors import ModelError

if TYPE_CHECKING:
    from steep.serving.conversation import Conversation

HELP = "/new begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def command(
    model: str = MODEL,
    serve: bool = typer.Option(
        False, "--serve", help="Serve it on loopback instead, with an OpenAI-compatible endpoint."
    ),
    server: str = typer.Option("auto", help="With --serve: auto, transformers, llama_cpp or vllm."),
    port: int = typer.Option(8000, min=1, max=65535, help="With --serve: where it listens."),
    system: str = typer.Option("", help="A first message that tells the model how to answer."),
    max_new_tokens: int = typer.Option(256, min=1, help="Largest number of new tokens of an answer."),
    temperature: float = typer.Option(0.7, min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(
        0.95, min=0.0, max=1.0, help="Sample from the likeliest tokens with this total probability."
    ),
    device: str = DEVICE,
    allow_code: Optional[bool] = ALLOW_CODE,
) -> None:
    """Talk to a model that has a chat template, or have another one complete text. Each line is one message."""
    if serve:
        serve_model(model, server, port)
        return
    prepare_imports(None, model)
    from steep.evaluation.generate import generate_text, sampling_options  # torch is heavy
    from steep.evaluation.loaded_model import open_model
    from steep.evaluation.model_reference import model_reference
    from steep.models.layers import max_positions
    from steep.runtime.precision import autocast
    from steep.serving.conversation import Conversation

    with open_model(model_reference(model), device=device, allow_code=allow_code) as loaded:
        positions = max_positions(loaded.model)
        room = None if positions is None else max(1, positions - min(max_new_tokens, positions // 4))
        talk = Conversation(loaded.tokenizer, loaded.hf_tokenizer, room, typer.echo, system)
        what = "talks" if talk.talks else "has no chat template, so it completes what you write"
        typer.echo(f"{model} {what}. {HELP}.")
        options = sampling_options(None, temperature=temperature, top_p=None if temperature == 0 else top_p)

        def answer(ids: list[int], emit: Callable[[str], None]) -> str:
            with autocast(loaded.runner.device, loaded.runner.precision):
                return generate_text(
                    loaded.model, loaded.tokenizer, ids, max_new_tokens=max_new_tokens, emit=emit, **options
                )

        converse(talk, answer)


def converse(talk: Conversation, answer: Callable[[list[int], Callable[[str], None]], str]) -> None:
    """Read lines and print answers, until the person leaves."""
    for line in lines_of_person():
        if line == "/new":
            talk.forget()
            continue
        try:
            ids = talk.ask(line)
        except ModelError as error:
            typer.echo(f"error: {error}", err=True)
            continue
        talk.answered(shown_answer(ids, answer, first="" if talk.talks else line))


def shown_answer(ids: list[int], answer: Callable[[list[int], Callable[[str], None]], str], first: str) -> str:
    """Print an answer as it comes and return it; what there is of it after Ctrl-C."""
    said: list[str] = []

    def show(text: str) -> None:
        said.append(text)
        out.write(text)

    try:
        with Wrapped(sys.stdout, first=first) as out:
            answer(ids, show)
    except KeyboardInterrupt:
        typer.echo("\n(stopped)")
    return "".join(said)


def lines_of_person() -> Iterator[str]:
    """The lines that are typed, without empty ones, until /exit, the end of the input, or Ctrl-C at the prompt."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                typer.echo()
            return
        if line == "/exit":
            return
        if line:
            yield line


def serve_model(model: str, server: str, port: int) -> None:
    """Serve until Ctrl-C, or until the server ends."""
    from steep.serving.served_model import served_model  # as above
    from steep.serving.server import choose_server, running_server

    files = served_model(model, typer.echo)
    name = choose_server(files, server)
    typer.echo(f"starting {name} for {files.folder} ...")
    with running_server(files, name, port) as running:
        typer.echo(f"{running.url} answers (chat/completions and completions); Ctrl-C stops it")
        try:
            code = running.process.wait()
        except KeyboardInterrupt:
            typer.echo("stopped")
            return
        typer.echo(f"the server ended with code {code}", err=True)
        raise typer.Exit(1 if code else 0)
