"""Reading text, and splitting it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.train.corpus import MAX_VALIDATION_SHARE, Corpus, open_corpus
from dsv3.train.data import SPLITS
from tests.train.common import texts, write_folder


def test_standard_library() -> None:
    corpus = open_corpus()
    train, valid = texts(corpus, "train"), texts(corpus, "valid")
    assert len(train) + len(valid) == corpus.num_documents > 400
    assert not train.keys() & valid.keys()
    assert 0.01 < len(valid) / corpus.num_documents < 0.12
    assert sum(len(t.encode()) for t in [*train.values(), *valid.values()]) == corpus.num_bytes
    names = [*train, *valid]
    assert "json/decoder.py" in names
    assert not any("site-packages" in n or n.startswith("test/") for n in names)
    assert max(len(t.encode()) for t in valid.values()) <= MAX_VALIDATION_SHARE * corpus.num_bytes


def test_folder_skips_and_counts(tmp_path: Path) -> None:
    write_folder(tmp_path, 30)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "program.exe").write_bytes(b"\0\xff")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.py").write_text("cached")
    (tmp_path / ".hidden.py").write_text("hidden")
    corpus = open_corpus(tmp_path)
    assert corpus.num_documents == 30
    assert sorted(p.name for p in corpus.skipped) == ["empty.jsonl", "empty.py", "latin1.txt"]


def test_split_does_not_depend_on_the_place_or_the_neighbours(corpus: Corpus, tmp_path: Path) -> None:
    moved = open_corpus(write_folder(tmp_path / "elsewhere"))
    assert texts(moved, "valid") == texts(corpus, "valid")
    (tmp_path / "elsewhere" / "another.py").write_text("x = 1\n")
    assert texts(open_corpus(tmp_path / "elsewhere"), "valid").keys() - {"another.py"} == texts(corpus, "valid").keys()
    assert 0 < len(texts(corpus, "valid")) < 20


def test_a_single_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\r\n" for i in range(20000))
    path = tmp_path / "one.txt"
    path.write_bytes(text.encode())
    for corpus in (open_corpus(path), open_corpus(tmp_path)):
        documents = {**texts(corpus, "train"), **texts(corpus, "valid")}
        assert "".join(documents[n] for n in sorted(documents, key=lambda n: int(n.split(":")[1]))) == text
        assert all(t.endswith("\r\n") for t in documents.values())
        assert 50 < corpus.num_documents <= 101
        assert texts(corpus, "valid")
    (tmp_path / "two.txt").write_text("x" * 5000)
    assert "".join(texts(open_corpus(tmp_path / "two.txt"), "train").values())


@pytest.mark.parametrize("count", [2, 3, 7])
def test_neither_side_of_a_split_is_empty(tmp_path: Path, count: int) -> None:
    corpus = open_corpus(write_folder(tmp_path, count))
    assert texts(corpus, "train")
    assert texts(corpus, "valid")


def test_links_and_other_files(tmp_path: Path) -> None:
    """Links to folders are followed, also in a circle; what is no text by its name is counted."""
    write_folder(tmp_path / "far", 4)
    root = write_folder(tmp_path / "near", 4)
    (root / "linked").symlink_to(tmp_path / "far")
    (root / "sub0" / "back").symlink_to(root)
    for name in ("README", "notes.text", "picture.png"):
        (root / name).write_text("something")
    corpus = open_corpus(root)
    assert corpus.num_documents == 8
    assert corpus.ignored == 3


def test_a_large_file_in_a_folder_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.txt").write_text("".join(f"line {i}\n" for i in range(20000)))
    (tmp_path / "small.txt").write_text("a line\n")
    assert open_corpus(tmp_path).num_documents == 2
    monkeypatch.setattr("dsv3.train.corpus.LARGE", 1000)
    corpus = open_corpus(tmp_path)
    assert corpus.num_documents > 50
    found = [d for split in SPLITS for d in corpus.documents(split) if d.name.startswith("large.txt:")]
    pieces = sorted(found, key=lambda d: int(d.name.partition(":")[2]))
    assert "".join(d.text for d in pieces) == (tmp_path / "large.txt").read_text()


@pytest.mark.parametrize("line", ["[" * 100000, '{"text": ' + "1" * 5000 + "}"], ids=["deep", "digits"])
def test_records_that_json_refuses(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: expected a (JSON object|string field)"):
        open_corpus(tmp_path / "a.jsonl")


@pytest.mark.parametrize("values", [[1, 2], [b"a", b"b"], [["a"], ["b"]]], ids=["numbers", "bytes", "lists"])
def test_parquet_of_no_text(values: list[object], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: expected strings in the column \"text\", found"):
        open_corpus(tmp_path / "a.parquet")


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"text {i} \ud83d\ude42 \ud800"} for i in range(50)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n" + json.dumps({"text": ""}) + "\n")
    corpus = open_corpus(path)
    assert corpus.num_documents == 50
    assert "text 7 🙂 \ufffd" in {**texts(corpus, "train"), **texts(corpus, "valid")}.values()
    path.write_text('{"text": "a"}\n{"content": "b"}\n')
    with pytest.raises(ValueError, match=r'data.jsonl line 2: expected a string field "text", found content'):
        open_corpus(path)
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r'data.jsonl line 2: expected a string field "text", found one of type int'):
        open_corpus(path)
    path.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"data.jsonl line 2: expected a JSON object, found Expecting"):
        open_corpus(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"data.parquet: reading .parquet needs pyarrow: pip install pyarrow"):
            open_corpus(path)
        return
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(40)] + [None, ""]}), path)
    assert open_corpus(path).num_documents == 40
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a", "b"]}), path)
    with pytest.raises(ValueError, match=r'expected a column "text", found content'):
        open_corpus(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"expected a parquet file, found"):
        open_corpus(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "bad.txt: expected text, found an empty file"),
        (b"abc\xff", "bad.txt: expected UTF-8 text, found byte 0xff at 3"),
        (b"too short", "expected at least 2 documents or 2048 characters, found 9 bytes"),
    ],
)
def test_unusable_file_given_by_name(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "bad.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        open_corpus(tmp_path / "bad.txt")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder: .*nowhere"):
        open_corpus(tmp_path / "nowhere")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"expected text under .*, found none \(1 empty or non-UTF-8 files skipped\)"):
        open_corpus(tmp_path)
