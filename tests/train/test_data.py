"""Token files, and the order in which they are read."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from torch import Tensor

from dsv3.tokenizer import load_tokenizer
from dsv3.train.corpus import Corpus, open_corpus
from dsv3.train.data import (
    SPLITS,
    BatchReader,
    SplitIndex,
    TokenDataset,
    TokenIndex,
    ValidationSet,
    read_index,
    tokenize_corpus,
)
from dsv3.train.tokenizer import SpecialIds, special_ids, train_tokenizer
from tests.train.common import texts


def write_tokens(folder: Path, documents: list[list[int]], bos: int | None = 0) -> None:
    """A token folder whose splits are these documents both."""
    folder.mkdir()
    ends = np.cumsum([0, *map(len, documents)])
    for split in SPLITS:
        np.concatenate(documents).astype(np.uint16).tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}.offsets.npy", np.array([ends, ends], np.int64))
    size = SplitIndex(len(documents), int(ends[-1]), int(ends[-1]), max(map(max, documents)))
    index = TokenIndex(65536, "uint16", "none", SpecialIds(bos, 1, (3, 4, 5)), dict.fromkeys(SPLITS, size))
    (folder / "index.json").write_text(json.dumps(dataclasses.asdict(index)))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return train_tokenizer((d.text for d in corpus.documents("train")), 300)


@pytest.fixture(scope="module")
def tokens(corpus: Corpus, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    tokenize_corpus(corpus, tokenizer, folder)
    return folder


# ---- token files ----
def test_token_file_holds_every_document(corpus: Corpus, tokenizer: Tokenizer, tokens: Path) -> None:
    index = read_index(tokens)
    for split in ("train", "valid"):
        documents = texts(corpus, split)
        ids = np.fromfile(tokens / f"{split}.bin", index.dtype)
        starts, byte_starts = np.load(tokens / f"{split}.offsets.npy")
        decoded = [tokenizer.decode(ids[a + 1 : b - 1], skip_special_tokens=False) for a, b in pairwise(starts)]
        assert decoded == list(documents.values())
        assert np.diff(byte_starts).tolist() == [len(t.encode()) for t in documents.values()]
        assert (ids[starts[:-1]] == index.special.bos).all()
        assert (ids == index.special.eos).sum() == len(documents)  # "<|eos|>" in the text is plain text
        assert index.splits[split].num_tokens == len(ids)
        assert index.splits[split].num_bytes == byte_starts[-1]
        assert index.splits[split].largest_token == ids.max()


def test_a_large_vocabulary_takes_four_bytes(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    large = Tokenizer.from_str(tokenizer.to_str())
    large.add_tokens([f"<extra{i}>" for i in range(70000)])
    assert tokenize_corpus(corpus, large, tmp_path / "large").dtype == "uint32"
    assert TokenDataset(tmp_path / "large", 16).batch(0, 1).shape == (1, 17)


def test_tokens_outside_the_vocabulary(tokens: Path) -> None:
    largest = max(s.largest_token for s in read_index(tokens).splits.values())
    assert read_index(tokens, vocab_size=largest + 1).vocab_size == 300
    with pytest.raises(
        ValueError, match=rf"expected tokens below the model's vocab_size {largest}, found token {largest}"
    ):
        TokenDataset(tokens, 16, vocab_size=largest)


def test_tokenizing_replaces_only_token_folders(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"expected a token folder or nothing at .*mine"):
        tokenize_corpus(corpus, tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep"
    tokenize_corpus(corpus, tokenizer, tmp_path / "tokens")
    tokenize_corpus(corpus, tokenizer, tmp_path / "tokens")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "tokens"]


def test_a_disk_that_fills_with_the_tokenizer(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last that is written: the line names the folder, of which nothing is left."""
    real = Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        if path.name.startswith(".tokenizer"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    out = tmp_path / "tokens"
    with pytest.raises(OSError, match=f"could not write {out}, which is as it was before: No space left on device"):
        tokenize_corpus(corpus, tokenizer, out)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_not_replaced(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever they hold that looks like ours; a link is followed."""
    site = tmp_path / "site"
    (site / "src").mkdir(parents=True)
    (site / "src" / "thesis.tex").write_text("precious")
    (site / "index.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="found something else: src"):
        tokenize_corpus(corpus, tokenizer, site)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "index.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"found something else: index\.json"):
        tokenize_corpus(corpus, tokenizer, tmp_path / "alone")
    made = tmp_path / "made"
    tokenize_corpus(corpus, tokenizer, made)
    (made / "runs").mkdir()
    with pytest.raises(ValueError, match="found something else: runs"):
        tokenize_corpus(corpus, tokenizer, made)
    assert (site / "src" / "thesis.tex").read_text() == "precious"
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    tokenize_corpus(corpus, tokenizer, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_index(tmp_path / "scratch") == read_index(made)


def test_what_a_killed_process_left_is_not_in_the_way(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokenize_corpus(corpus, tokenizer, tokens)
    (tokens / ".baselines.json.4242").write_text("half")
    tokenize_corpus(corpus, tokenizer, tokens)
    assert not (tokens / ".baselines.json.4242").exists()
    tokens.rename(tmp_path / ".tokens.replaced")
    (tmp_path / "tokens.txt").write_text("not in the way")
    with pytest.raises(FileNotFoundError):
        tokenize_corpus(dataclasses.replace(corpus, files=(corpus.root / "gone.py",)), tokenizer, tokens)
    assert read_index(tokens).vocab_size == tokenizer.get_vocab_size()


def test_a_failure_leaves_the_old_folder(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenize_corpus(corpus, tokenizer, tmp_path / "tokens")
    before = (tmp_path / "tokens" / "train.bin").read_bytes()
    gone = Corpus(corpus.root, (*corpus.files, corpus.root / "gone.py"), (), 0, False, 1, 1, corpus.threshold, 10**9)
    with pytest.raises(FileNotFoundError):
        tokenize_corpus(gone, tokenizer, tmp_path / "tokens")
    assert (tmp_path / "tokens" / "train.bin").read_bytes() == before
    assert os.listdir(tmp_path) == ["tokens"]


def test_damaged_token_folders(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder made by `dsv3 tokenize`, found no .*index.json"):
        read_index(tmp_path)
    tokenize_corpus(corpus, tokenizer, tmp_path / "t")
    raw = (tmp_path / "t" / "train.bin").read_bytes()
    (tmp_path / "t" / "train.bin").write_bytes(raw[:-2])
    with pytest.raises(ValueError, match=rf"train.bin: expected {len(raw)} bytes, found {len(raw) - 2}"):
        TokenDataset(tmp_path / "t", 16)
    (tmp_path / "t" / "train.bin").write_bytes(raw)
    offsets = tmp_path / "t" / "train.offsets.npy"
    for damaged in (b"", (tmp_path / "t" / "valid.offsets.npy").read_bytes()):
        offsets.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train.offsets.npy: expected "):
            TokenDataset(tmp_path / "t", 16)
    index = (tmp_path / "t" / "index.json").read_text()
    for text in ("{}", index.replace("uint16", "int3"), re.sub(r'"num_tokens": \d+', '"num_tokens": "many"', index)):
        (tmp_path / "t" / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index.json: expected the index that `dsv3 tokenize` writes"):
            read_index(tmp_path / "t")


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_split_rate_is_a_fraction(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match=f"split_rate must lie between 0 and 1, got {rate}"):
        tokenize_corpus(corpus, tokenizer, tmp_path / "t", split_rate=rate)
    assert not any(tmp_path.iterdir())


def test_a_file_that_asks_for_truncation_and_padding(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = tokenize_corpus(corpus, tokenizer, tmp_path / "whole")
    cut = Tokenizer.from_str(tokenizer.to_str())
    cut.enable_truncation(8)
    cut.enable_padding(length=64)
    cut.save(str(tmp_path / "cut.json"))
    for name, given in (("given", cut), ("read", load_tokenizer(tmp_path / "cut.json"))):
        assert tokenize_corpus(corpus, given, tmp_path / name).splits == whole.splits
    prompt = "a prompt of more than eight tokens, which nothing may cut"
    assert load_tokenizer(tmp_path / "cut.json").encode(prompt).ids == tokenizer.encode(prompt).ids


def test_split_rate_splits_some_joined_tokens(
    corpus: Corpus, tokenizer: Tokenizer, tokens: Path, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    for i in range(40):
        (code / f"f{i}.py").write_text(f"def f{i}(x):\n    return {{x}}\n" * 20)
    corpus = open_corpus(code)
    tokenizer = train_tokenizer((d.text for d in corpus.documents("train")), 300)
    counts = [
        tokenize_corpus(corpus, tokenizer, tmp_path / f"r{rate}", split_rate=rate).splits for rate in (0.0, 0.5, 1.0)
    ]
    train = [c["train"].num_tokens for c in counts]
    assert train[0] < train[1] < train[2]
    assert (train[1] - train[0]) / (train[2] - train[0]) == pytest.approx(0.5, abs=0.1)
    assert len({c["valid"].num_tokens for c in counts}) == 1
    ids = np.fromfile(tmp_path / "r0.5" / "train.bin", np.uint16)
    assert tokenizer.decode(ids) == "".join(texts(corpus, "train").values())


# ---- reading ----
def stream(tokens: Path) -> np.ndarray:
    return np.fromfile(tokens / "train.bin", np.uint16)


def test_an_epoch_reads_every_window_once(tokens: Path) -> None:
    """From the first token on in the first epoch, later from one of those that leave as many windows."""
    dataset, all_tokens = TokenDataset(tokens, 32, seed=3), stream(tokens)
    n = dataset.windows_per_epoch
    assert n == (len(all_tokens) - 1) // 32
    first, second = dataset.batch(0, n), dataset.batch(n, n)
    for epoch in (first, second):
        expected = {
            begin: {tuple(all_tokens[begin + i * 32 :][:33].tolist()) for i in range(n)}
            for begin in range(len(all_tokens) - 32 * n)
        }
        begins = [begin for begin, windows in expected.items() if {tuple(row) for row in epoch.tolist()} == windows]
        assert begins == ([0] if epoch is first else [dataset._begin])
    assert not first.equal(second)
    assert not first.equal(TokenDataset(tokens, 32, seed=4).batch(0, n))


def test_no_token_is_left_out_for_ever(tmp_path: Path) -> None:
    """Short documents, of which each gets three tokens more than the windows count with."""
    tokens = tmp_path / "short"
    write_tokens(tokens, [[0, 100 + i, 50, 1] for i in range(200)])
    dataset = TokenDataset(tokens, 32, fim_rate=1.0)
    n, seen = dataset.windows_per_epoch, set()
    for epoch in range(40):
        seen |= set(dataset.batch(epoch * n, n).flatten().tolist())
    assert seen >= set(range(100, 300))


def test_a_window_reads_no_more_than_it_takes(tmp_path: Path) -> None:
    """However long the document is, with and without a hole in it."""
    write_tokens(tmp_path / "long", [[0, *range(100, 65000), 1]])
    for rate in (0.0, 1.0):
        dataset = TokenDataset(tmp_path / "long", 8, fim_rate=rate)
        dataset._prepare(0)
        parts = dataset._document(0)
        assert [part.base is not None for part in parts if len(part) > 1] == [True] * sum(len(p) > 1 for p in parts)
        whole = np.concatenate(parts)
        for start in (0, 1, 7, 30000, len(whole) - 9):
            assert dataset._read(start).tolist() == whole[start : start + 9].tolist()


def test_tokens_that_the_model_lacks(tokens: Path) -> None:
    """Also those that nothing but fill-in-the-middle puts in."""
    index = read_index(tokens)
    used = max(split.largest_token for split in index.splits.values()) + 1
    special = dataclasses.replace(index.special, fim=(used, used + 1, used + 2))
    raw = json.loads((tokens / "index.json").read_text())
    raw["special"]["fim"] = special.fim
    (tokens / "index.json").write_text(json.dumps(raw))
    try:
        TokenDataset(tokens, 16, vocab_size=used)
        with pytest.raises(
            ValueError, match=rf"vocab_size {used}, found fill-in-the-middle token {used + 2}: set fim_rate=0"
        ):
            TokenDataset(tokens, 16, vocab_size=used, fim_rate=0.1)
    finally:
        raw["special"]["fim"] = index.special.fim
        (tokens / "index.json").write_text(json.dumps(raw))


def test_reading_is_a_function_of_the_position(tokens: Path) -> None:
    dataset = TokenDataset(tokens, 32, seed=3, fim_rate=0.5)
    n = dataset.windows_per_epoch
    whole = dataset.batch(0, 2 * n + 5)
    for position, count in ((n - 2, 5), (3, 1), (2 * n, 5)):
        assert (
            TokenDataset(tokens, 32, seed=3, fim_rate=0.5)
            .batch(position, count)
            .equal(whole[position : position + count])
        )


def test_the_order_is_the_same_in_another_process(tokens: Path) -> None:
    read = f"print(TokenDataset({str(tokens)!r}, 8, seed=1, fim_rate=0.3).batch(0, 20).sum(1))"
    code = f"from dsv3.train.data import TokenDataset; {read}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(TokenDataset(tokens, 8, seed=1, fim_rate=0.3).batch(0, 20).sum(1))


def test_ranks_share_the_global_batch_and_the_position_is_restored(tokens: Path) -> None:
    dataset = TokenDataset(tokens, 32)
    alone = BatchReader(dataset)
    ranks = [BatchReader(dataset, rank=r, world_size=4) for r in range(4)]
    for size in (8, 4, 12):
        whole = alone.next(size)
        assert isinstance(whole, Tensor)
        assert whole.tolist() == [row for r in ranks for row in r.next(size).tolist()]
    state = json.loads(json.dumps(alone.state_dict()))
    following = alone.next(6)
    resumed = BatchReader(TokenDataset(tokens, 32))
    resumed.load_state_dict(state)
    assert resumed.next(6).equal(following)
    with pytest.raises(ValueError, match="the batch must divide by 4 ranks, found 6 sequences"):
        ranks[0].next(6)
    with pytest.raises(ValueError, match="cannot resume on other data: expected windows_per_epoch"):
        BatchReader(TokenDataset(tokens, 16)).load_state_dict(state)


def test_too_few_tokens(tokens: Path) -> None:
    total = len(stream(tokens))
    with pytest.raises(ValueError, match=rf"expected at least {total + 1} train tokens, found {total}"):
        TokenDataset(tokens, total)


def test_fill_in_the_middle(tokens: Path) -> None:
    """Every document of the stream is the original or one with prefix, suffix and middle in PSM order."""
    originals: set[tuple[int, ...]] = set()
    all_tokens = stream(tokens)
    starts = np.load(tokens / "train.offsets.npy")[0]
    originals = {tuple(all_tokens[a:b].tolist()) for a, b in pairwise(starts)}
    dataset = TokenDataset(tokens, 1, fim_rate=0.4)  # windows of 2 tokens, put back in order
    n = dataset.windows_per_epoch
    for epoch in range(2):
        rows = dataset.batch(epoch * n, n).numpy()
        read = rows[np.argsort(dataset._order), 0]
        cuts = np.flatnonzero(read == 0).tolist()
        seen = [read[a:b].tolist() for a, b in pairwise(cuts)]
        moved = [d for d in seen if 3 in d]
        assert len(moved) / len(seen) == pytest.approx(0.4, abs=0.15)
        for document in seen:
            if 3 in document:
                assert document[1] == 3
                hole, middle = document.index(4), document.index(5)
                prefix, suffix, body = document[2:hole], document[hole + 1 : middle], document[middle + 1 : -1]
                document = [0, *prefix, *body, *suffix, 1]
            assert tuple(document) in originals


def test_fill_in_the_middle_needs_its_tokens(tokens: Path, tmp_path: Path) -> None:
    for file in tokens.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / "index.json").read_text())
    index["special"]["fim"] = None
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"fim_rate 0.1 needs fill-in-the-middle tokens"):
        TokenDataset(tmp_path, 16, fim_rate=0.1)


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 16), (16, 5), (16, 1), (1, 1), (10000, 10000)])
def test_validation_scores_every_token_once(tokens: Path, seq_len: int, stride: int) -> None:
    valid = ValidationSet(tokens, seq_len, stride=stride)
    all_tokens = np.fromfile(tokens / "valid.bin", np.uint16)
    starts = np.load(tokens / "valid.offsets.npy")[0]
    expected = [t for a, b in pairwise(starts) for t in all_tokens[a + 1 : b].tolist()]
    scored = []
    for rows, mask in valid.batches(7):
        assert rows.shape[0] == mask.shape[0] <= 7
        assert rows.shape[1] == mask.shape[1] + 1 == seq_len + 1
        for row, marked in zip(rows, mask, strict=True):
            scored += row[1:][marked].tolist()
            inputs = row[:-1][: int(marked.nonzero()[-1]) + 1]
            assert (inputs[1:] != 0).all()  # a second bos would be another document
            if stride < seq_len and int(inputs[0]) != 0:
                assert int(marked.nonzero()[0]) >= seq_len - stride
    assert scored == expected
    assert valid.num_targets == len(expected)


@pytest.mark.parametrize("seq_len", [2, 16])
def test_validation_without_a_token_for_the_beginning(tmp_path: Path, seq_len: int) -> None:
    """An eos stands in front of every document, so that its first token is scored too."""
    documents = [[100, 101, 102, 1], [103, 1], [104, 105, 106, 107, 108, 1]]
    write_tokens(tmp_path / "t", documents, bos=None)
    valid, scored = ValidationSet(tmp_path / "t", seq_len), []
    for rows, mask in valid.batches(2):
        for row, marked in zip(rows, mask, strict=True):
            scored += row[1:][marked].tolist()
            assert row[0] != 0
    assert scored == [token for document in documents for token in document]
    assert valid.num_targets == len(scored)
    rows, _ = next(valid.batches(1))
    assert rows[0, :3].tolist() == [1, 100, 101]


def test_bits_per_byte(tokens: Path, corpus: Corpus) -> None:
    valid = ValidationSet(tokens, 16)
    assert valid.num_bytes == sum(len(t.encode()) for t in texts(corpus, "valid").values())
    assert valid.bits_per_byte(valid.num_bytes * math.log(2)) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"stride must be in 1..16, found 17"):
        ValidationSet(tokens, 16, stride=17)


def test_special_ids_are_in_the_index(tokens: Path, tokenizer: Tokenizer) -> None:
    assert read_index(tokens).special == special_ids(tokenizer)
