"""Text on disk as documents: the standard library's source by default, or a .txt, .jsonl or .parquet file, or a folder.

A corpus is scanned once (sizes, unusable files, the validation split) and then streamed as often as needed, so
nothing but one file has to fit in memory. A file that makes the whole corpus, or a large one in a folder, is cut into
documents. The validation split goes by the hash of a document's name: a file's path relative to the folder, so that
it depends neither on the machine nor on the order of files. A document of more than 2% of the corpus always trains,
so that no single file makes up the validation text.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEXT_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        "c cc cfg cpp css csv cu cuh go h hpp htm html ini java js jsonl lua md parquet py pyi r rb rs",
        "rst scala sh sql swift tex toml ts tsv txt xml yaml yml",
    )
    for name in names.split()
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
VALIDATION_FRACTION = 0.05
MAX_VALIDATION_SHARE = 0.02  # of the corpus, for one validation document
PIECES = 100  # documents that a corpus of one file is cut into
MIN_PIECE, MAX_PIECE = 1 << 10, 1 << 16  # characters of such a document
LARGE = 1 << 23  # characters of a file that is cut in a folder too


class UnusableFile(ValueError):
    """A file without text: skipped and counted inside a folder, an error when given by name."""


@dataclass(frozen=True)
class Document:
    """One document; `name` is unique in its corpus and decides the split."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A scanned corpus; sizes are bytes of UTF-8. Validation text has hash(name) < threshold and size <= max_size."""

    root: Path
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]  # empty, or not UTF-8
    ignored: int  # files whose names end otherwise than text's do
    pieces: bool
    num_documents: int
    num_bytes: int
    threshold: int
    max_size: int

    def documents(self, split: str) -> Iterator[Document]:
        """Stream the documents of split "train" or "valid", in the order of their files."""
        if split not in ("train", "valid"):
            raise ValueError(f'split must be "train" or "valid", found {split!r}')
        for path in self.files:
            for document in _read(path, self.root, self.pieces):
                valid = _name_hash(document.name) < self.threshold and len(document.text.encode()) <= self.max_size
                if valid == (split == "valid"):
                    yield document

    def fingerprint(self) -> str:
        """Hex digest over names, sizes and modification times: equal while the files are untouched."""
        digest = hashlib.sha256(str(self.pieces).encode())
        for path in self.files:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return digest.hexdigest()


def open_corpus(path: str | os.PathLike[str] | None = None) -> Corpus:
    """Scan `path`, or the Python standard library when it is None.

    The standard library goes without its `test` package, which many distributions leave out, so that the text is nearly
    the same everywhere. Raises ValueError for a path that does not exist, a file that is empty or not UTF-8, a folder
    with no usable text, a record without text, and text too short to split.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in _walk(root) if f.suffix == ".py" and f.relative_to(root).parts[0] != "test"]
        return _scan(root, files, by_name=False)
    root = Path(path)
    if root.is_dir():
        found = _walk(root)
        files = [f for f in found if f.suffix.lower() in TEXT_SUFFIXES]
        return _scan(root, files, by_name=False, ignored=len(found) - len(files))
    if not root.exists():
        raise ValueError(f"no such file or folder: {root}")
    return _scan(root, [root], by_name=True)


def _walk(root: Path) -> list[Path]:
    """The files below a folder, links to folders followed; no folder twice."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            names.clear()
            continue
        seen.add(place)
        names[:] = sorted(n for n in names if n not in SKIPPED_FOLDERS and not n.startswith("."))
        found += [Path(folder, f) for f in files if not f.startswith(".")]
    return sorted((f for f in found if f.is_file()), key=lambda f: f.relative_to(root).as_posix())


def _scan(root: Path, files: list[Path], *, by_name: bool, ignored: int = 0) -> Corpus:
    usable, skipped, hashes, sizes = [], [], [], []
    for path in files:
        start = len(hashes)
        try:
            for document in _read(path, root, pieces=by_name):
                hashes.append(_name_hash(document.name))
                sizes.append(len(document.text.encode()))
        except UnusableFile:
            if by_name:
                raise
            del hashes[start:], sizes[start:]
            skipped.append(path)
        else:
            usable.append(path)
    if not usable:
        others = f", {ignored} of other kinds" if ignored else ""
        raise ValueError(
            f"expected text under {root}, found none ({len(skipped)} empty or non-UTF-8 files skipped{others})"
        )
    if len(hashes) == 1 and not by_name:
        return _scan(root, usable, by_name=True, ignored=ignored)
    if len(hashes) < 2:
        raise ValueError(
            f"{root}: expected at least 2 documents or {2 * MIN_PIECE} characters, found {sum(sizes)} bytes"
        )
    max_size = int(MAX_VALIDATION_SHARE * sum(sizes))
    if min(sizes) > max_size:
        max_size = max(sizes)
    candidates = [h for h, size in zip(hashes, sizes, strict=True) if size <= max_size]
    threshold = max(int(VALIDATION_FRACTION * 2**64), min(candidates) + 1)  # neither side of the split is ever empty
    if len(candidates) == len(hashes):
        threshold = min(threshold, max(hashes))
    return Corpus(root, tuple(usable), tuple(skipped), ignored, by_name, len(hashes), sum(sizes), threshold, max_size)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def _read(path: Path, root: Path, pieces: bool) -> Iterator[Document]:
    name = path.name if path == root else path.relative_to(root).as_posix()
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, name)
    if suffix == ".jsonl":
        return _read_jsonl(path, name)
    return _read_text(path, name, pieces)


def _read_text(path: Path, name: str, pieces: bool) -> Iterator[Document]:
    raw = path.read_bytes()
    if not raw:
        raise UnusableFile(f"{path}: expected text, found an empty file")
    text = _decode(raw, path)
    if not pieces and len(text) <= LARGE:
        yield Document(name, text)
        return
    size = min(max(len(text) // PIECES, MIN_PIECE), MAX_PIECE)
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + size - 1) + 1
        end = line_end if 0 < line_end <= start + 2 * size else min(start + size, len(text))
        yield Document(f"{name}:{start}", text[start:end])
        start = end


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    found = False
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = _decode(raw, path)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (
                ValueError,
                RecursionError,
            ) as error:  # broken, with numbers of thousands of digits, or nested as deep
                raise ValueError(f"{path} line {number}: expected a JSON object, found {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                what = type(record).__name__
                if isinstance(record, dict):
                    what = (
                        f"one of type {type(record['text']).__name__}"
                        if "text" in record
                        else ", ".join(record) or "nothing"
                    )
                raise ValueError(f'{path} line {number}: expected a string field "text", found {what}')
            if record["text"]:
                found = True
                yield Document(f"{name}:{number}", _valid_unicode(record["text"]))
    if not found:
        raise UnusableFile(f"{path}: expected text, found no records")


def _read_parquet(path: Path, name: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise ValueError(f'{path}: expected a column "text", found {names}')
            kind = table.schema_arrow.field("text").type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not any(
                getattr(pyarrow.types, f"is_{name}")(kind) for name in ("string", "large_string", "string_view")
            ):
                raise ValueError(f'{path}: expected strings in the column "text", found {kind}')
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text:
                        yield Document(f"{name}:{row}", _valid_unicode(text))
    except pyarrow.ArrowInvalid as error:
        raise UnusableFile(f"{path}: expected a parquet file, found {str(error).splitlines()[0]}") from None
    if row == 0:
        raise UnusableFile(f"{path}: expected text, found no rows")


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UnusableFile(
            f"{path}: expected UTF-8 text, found byte 0x{raw[error.start]:02x} at {error.start}"
        ) from None


def _valid_unicode(text: str) -> str:
    """JSON can spell lone surrogates, which UTF-8 cannot hold: they become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
