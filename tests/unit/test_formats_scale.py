"""Stores of the size of real corpora, on sparse files: memory and counts that do not depend on what the tokens are."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DOCUMENTS = 20_000_000
TOKENS = 18_000_000_000

OPENED = """
import sys, time
from pathlib import Path
import numpy as np
from steep.store.reader import open_store

started = time.monotonic()
store = open_store(sys.argv[1], unit=sys.argv[2])
opened = time.monotonic() - started
out = np.empty(8, dtype=np.int64)
for document in np.random.default_rng(0).integers(0, store.num_documents, 1000).tolist():
    store.read(document, 0, 8, out)
store.read(store.num_documents - 1, 0, 8, out)
peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]  # ru_maxrss begins with the parent's
print(store.num_documents, store.num_tokens, *out, opened, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["documents", "sequences"])
def test_twenty_million_documents_open_in_bounded_memory(tmp_path: Path, unit: str) -> None:
    lengths = np.full(DOCUMENTS, TOKENS // DOCUMENTS, dtype="<i4")
    lengths[::2] += 100
    lengths[1::2] -= 100
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    with open(tmp_path / "a.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, DOCUMENTS, DOCUMENTS + 1))
        file.write(lengths.tobytes() + (starts * 2).tobytes() + np.arange(DOCUMENTS + 1, dtype="<i8").tobytes())
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(2 * TOKENS)
        file.seek(int(starts[-1]) * 2)
        file.write(np.arange(1, 9, dtype="<u2").tobytes())
    command = [sys.executable, "-c", OPENED, str(tmp_path / "a"), unit]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    documents, tokens, *ids, seconds, peak_kilobytes = result.stdout.split()
    assert (int(documents), int(tokens)) == (DOCUMENTS, TOKENS)
    assert list(map(int, ids)) == [1, 2, 3, 4, 5, 6, 7, 8]
    print(f"{unit}: opened in {float(seconds):.2f} s, peak {int(peak_kilobytes) / 1024:.0f} MiB")
    assert int(peak_kilobytes) < 600 * 1024  # 160 MB of lengths, and what was read of the index, which is 400 MB


def test_more_shards_than_a_process_may_usually_open(tmp_path: Path) -> None:
    """1,500 shards in a process that may open 1,024 files, and could open more."""
    for number in range(1500):
        (tmp_path / f"s{number:04d}.bin").write_bytes(struct.pack("<2H", number + 3, 2))
    program = (
        "import resource, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))\n"
        "from steep.store.reader import open_store\n"
        "store = open_store(sys.argv[1], eos_id=2, format='nanogpt')\n"
        "print(store.num_documents, store.document(1499)[0])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1500", "1502"]
