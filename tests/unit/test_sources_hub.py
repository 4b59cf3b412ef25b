"""Datasets streamed with the `datasets` library: the same code as for the hub, over local folders laid out like its datasets."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from steep.config.load import load_run_config
from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.sources.document import NO_FIELD, Document, Rejected
from steep.sources.formats import hub
from steep.store.config import PrepareConfig
from steep.store.prepare import prepare_sources
from steep.store.reader import open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_tokenizer

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A dataset of two configurations; `pages` has three training files and one for validation."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: pages\n  default: true\n  data_files:\n"
        "  - split: train\n    path: pages/train-*.jsonl.gz\n"
        "  - split: validation\n    path: pages/validation.jsonl\n- config_name: columns\n  data_files: columns/*.jsonl\n---\n"
    )
    for name in ("pages", "columns"):
        (folder / name).mkdir()
    for number in range(3):
        lines = [json.dumps({"text": text}) for text in documents[number * 5 : number * 5 + 5]]
        (folder / "pages" / f"train-{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "pages" / "validation.jsonl").write_text(json.dumps({"text": documents[30]}) + "\n")
    rows = [json.dumps({"body": text, "number": number}) for number, text in enumerate(documents[:4])]
    (folder / "columns" / "a.jsonl").write_text("\n".join(rows))
    return folder


def read(name: str, **options: str) -> list[Document | Rejected]:
    return list(hub.read(Path(name), SourceConfig(path=name, **options)))


def test_rows_come_in_the_order_of_the_files(dataset: Path, documents: list[str]) -> None:
    records = read(f"hub:{dataset}")
    assert [record.text for record in records if isinstance(record, Document)] == documents[:15]
    assert records[6].id == f"hub:{dataset}, file 2:2"  # type: ignore[union-attr]
    assert [record.text for record in read(f"hub:{dataset}:pages:validation")] == [documents[30]]  # type: ignore[union-attr]
    texts = [record.text for record in read(f"hub:{dataset}:columns", text_key="body")]  # type: ignore[union-attr]
    assert texts == documents[:4]


def test_parts_joined_are_the_whole(dataset: Path) -> None:
    path, config = Path(f"hub:{dataset}"), SourceConfig(path="x")
    spans = hub.split(path, 1)
    assert spans == [(0, 1), (1, 2), (2, 3)]
    assert [r for span in spans for r in hub.read(path, config, span)] == list(hub.read(path, config))


def test_a_row_without_text_is_rejected_with_what_is_there(dataset: Path) -> None:
    records = read(f"hub:{dataset}:columns")
    assert {record.reason for record in records if isinstance(record, Rejected)} == {NO_FIELD}
    assert "columns: 'body', 'number'" in str(records[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dataset_is_prepared_and_found_again(
    dataset: Path, documents: list[str], tokenizer: TextTokenizer, tmp_path: Path, workers: int
) -> None:
    source = SourceConfig(path=[f"hub:{dataset}", f"hub:{dataset}:pages:validation"])
    result = prepare_sources([source], tokenizer, tmp_path / "out", PrepareConfig(workers=workers))
    store = open_store(result.path)
    texts = [tokenizer.decode(store.document(number)[:-1]) for number in range(store.num_documents)]
    assert texts == [*documents[:15], documents[30]]
    assert [entry["path"] for entry in store.manifest["sources"]] == source.path
    assert prepare_sources([source], tokenizer, tmp_path / "out", PrepareConfig(workers=1)).already_there
    assert store.manifest["shards"][1]["documents"] == 5


def test_changed_files_are_another_dataset(dataset: Path) -> None:
    path = Path(f"hub:{dataset}")
    before = hub.identity(path)
    assert hub.identity(path) == before
    assert hub.identity(Path(f"{path}:pages:validation")) != before
    file = dataset / "pages" / "train-2.jsonl.gz"
    file.write_bytes(file.read_bytes())
    assert hub.identity(path) != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:", "hub:NAME:CONFIG:SPLIT"),
        ("hub:a:b:c:d", "hub:NAME:CONFIG:SPLIT"),
        ("hub:{dataset}:nothing", "nothing"),
        ("hub:{dataset}::nothing", "nothing"),
        ("hub:./no_such_folder", "no_such_folder"),
    ],
)
def test_what_cannot_be_had_is_named(dataset: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(name.format(dataset=dataset))


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(DataError, match="cannot be read"):
        read(f"hub:{tmp_path}")


def test_without_the_library_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['datasets'] = None\n"
        "from pathlib import Path; from steep.sources.formats import hub\n"
        "from steep.core.errors import MissingExtraError\n"
        "try: hub.identity(Path('hub:x'))\n"
        "except MissingExtraError as error: print(error)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "pip install 'steep[hub]'" in finished.stdout, finished.stderr


def test_a_configuration_may_name_a_dataset() -> None:
    config = load_run_config(mapping={"model": {"pretrained": "gpt2"}, "data": {"train": [{"path": "hub:a/b:c"}]}})
    assert config.data.train[0].path == "hub:a/b:c"
