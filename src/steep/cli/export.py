"""`steep export`: a trained model in the format that another program serves."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

import steep
from steep.cli.options import ALLOW_CODE, MODEL
from steep.cli.packages import prepare_imports


def command(
    run: str = MODEL,
    to: str = typer.Option(
        "hf",
        help="hf: a folder for transformers and vLLM. gguf: a file for llama.cpp. ollama: the same and a Modelfile. "
        "adapter: a folder for peft.",
    ),
    out: Optional[Path] = typer.Option(None, help="Default: <run>/export/<to>."),
    dtype: Optional[str] = typer.Option(None, help="f32, bf16 (default) or f16; q8_0 for gguf and ollama."),
    quantize: Optional[str] = typer.Option(None, help="For hf: nf4, int8 or torchao_int8."),
    max_shard_size: str = typer.Option("5GB", help="Largest weight file."),
    tokenizer_pre: Optional[str] = typer.Option(
        None, help="For gguf: llama.cpp's name of the rule that splits text, if it is not recognized."
    ),
    verify_with: Optional[str] = typer.Option(
        None, help="For gguf: a Python interpreter with llama-cpp-python; default $STEEP_LLAMA_CPP_PYTHON."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing export."),
    allow_code: Optional[bool] = ALLOW_CODE,
) -> None:
    """Write a trained model for other programs, and verify it by loading it there."""
    if quantize is None:
        prepare_imports(None, run)
    result = steep.export(
        run,
        to=to,
        out=out,
        dtype=dtype,
        quantize=quantize,
        max_shard_size=max_shard_size,
        tokenizer_pre=tokenizer_pre,
        verify_with=verify_with,
        overwrite=overwrite,
        allow_code=allow_code,
    )
    typer.echo(str(result))
