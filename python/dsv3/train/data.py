"""Token files and what reads them: memory-mapped, shuffled deterministically, with an exact position.

A token folder holds, for each of the splits "train" and "valid", `<split>.bin` (uint16, or uint32 where the vocabulary
has more than 65536 tokens; each document is bos + text + eos) and `<split>.offsets.npy` (int64 [2, documents + 1]:
where a document begins in tokens, in bytes), one `index.json` for both, and the tokenizer.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3.files import leftover_of, put_back, replace_folder
from dsv3.tokenizer import for_whole_texts
from dsv3.train.corpus import Corpus, Document
from dsv3.train.tokenizer import SpecialIds, joined_tokens, save_tokenizer, special_ids, tokenizer_sha

SPLITS = ("train", "valid")
ENCODE_BATCH = 256  # documents
T = TypeVar("T")


@dataclass(frozen=True)
class SplitIndex:
    """What index.json says of one split; `num_bytes` counts the text, `num_tokens` also bos and eos."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    largest_token: int


@dataclass(frozen=True)
class TokenIndex:
    """index.json: the tokenizer a folder was made with, its special ids, and the sizes of the splits."""

    vocab_size: int
    dtype: str
    tokenizer_sha: str
    special: SpecialIds
    splits: dict[str, SplitIndex]


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, out_dir: str | os.PathLike[str], *, split_rate: float = 0.0
) -> TokenIndex:
    """Write the token folder of a corpus, complete or not at all: to a temporary name first. An older one is replaced.

    Special tokens that occur in the text are encoded as plain text. `split_rate` of the training tokens that join
    punctuation and a line break are split in two (arXiv 2412.19437, section 4.1). Raises ValueError where `out_dir`
    holds anything else than a token folder, or the tokenizer has no end-of-document token, and OSError where the disk is full.
    """
    if not 0 <= split_rate <= 1:
        raise ValueError(f"split_rate must lie between 0 and 1, got {split_rate}")
    out_dir = Path(out_dir).resolve()
    put_back(out_dir)
    _check_replaceable(out_dir)
    tokenizer = for_whole_texts(Tokenizer.from_str(tokenizer.to_str()))
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not vocab_size:
        raise ValueError("expected a tokenizer with tokens, found an empty vocabulary")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    special = special_ids(tokenizer)
    sha = tokenizer_sha(tokenizer)
    temporary = out_dir.with_name(f".{out_dir.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    joined = joined_tokens(tokenizer) if split_rate > 0 else {}
    try:
        splits = {
            name: _write_split(
                corpus.documents(name),
                plain,
                special,
                temporary / name,
                dtype,
                joined if name == "train" else {},
                split_rate,
            )
            for name in SPLITS
        }
        index = TokenIndex(vocab_size, dtype, sha, special, splits)
        save_tokenizer(tokenizer, temporary)
        (temporary / "index.json").write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")
        replace_folder(temporary, out_dir)
    except OSError as error:
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of write_whole, or as it is
        if reason.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"could not write {out_dir}, which is as it was before: {reason.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def _check_replaceable(folder: Path) -> None:
    """ValueError unless nothing is there, or a token folder and nothing else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    names = {"index.json", "tokenizer.json", "tokenizer_config.json", "baselines.json"}
    names |= {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "offsets.npy")}
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    foreign = sorted(name for name in found if (leftover_of(name) or name) not in names)
    if not foreign:
        try:
            read_index(folder)
        except ValueError:
            foreign = ["index.json"]
    if foreign:
        raise ValueError(
            f"expected a token folder or nothing at {folder}, found something else: {', '.join(foreign[:3])}"
        )


def _write_split(
    docs: Iterable[Document],
    plain: Tokenizer,
    special: SpecialIds,
    stem: Path,
    dtype: str,
    joined: dict[int, tuple[int, int]],
    split_rate: float,
) -> SplitIndex:
    ends, sizes, largest = [0], [0], 0
    with stem.with_suffix(".bin").open("wb") as out:
        for group in _groups(docs, ENCODE_BATCH):
            texts = [d.text for d in group]
            encodings = plain.encode_batch_fast(texts, add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True):
                ids = _split_joined(encoding.ids, joined, split_rate, len(ends)) if joined else encoding.ids
                ids = [*ids, special.eos]
                tokens = np.array(ids if special.bos is None else [special.bos, *ids], dtype)
                out.write(tokens.tobytes())
                ends.append(ends[-1] + len(tokens))
                sizes.append(sizes[-1] + len(text.encode()))
                largest = max(largest, int(tokens.max()))
    np.save(stem.with_suffix(".offsets.npy"), np.array([ends, sizes], np.int64))
    return SplitIndex(len(ends) - 1, ends[-1], sizes[-1], largest)


def _split_joined(ids: list[int], joined: dict[int, tuple[int, int]], rate: float, document: int) -> list[int]:
    """`rate` of the tokens in `joined`, drawn by document and place, replaced by their two parts."""
    draws = _hash(0, document, np.arange(len(ids))) < rate * 2.0**64
    parts = (joined[i] if draw and i in joined else (i,) for i, draw in zip(ids, draws.tolist(), strict=True))
    return [token for part in parts for token in part]


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (itertools.batched, which Python 3.11 lacks)."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def read_index(folder: str | os.PathLike[str], *, vocab_size: int | None = None) -> TokenIndex:
    """Read index.json; with `vocab_size`, ValueError where the folder holds tokens that such a model does not have."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise ValueError(f"expected a folder made by `dsv3 tokenize`, found no {path}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        fim = raw["special"].pop("fim")
        special = SpecialIds(fim=None if fim is None else (fim[0], fim[1], fim[2]), **raw.pop("special"))
        splits = {name: SplitIndex(**raw["splits"][name]) for name in SPLITS}
        index = TokenIndex(**{**raw, "special": special, "splits": splits})
        sizes = [size for split in splits.values() for size in asdict(split).values()]
        if index.dtype not in ("uint16", "uint32") or any(type(size) is not int for size in sizes):
            raise ValueError(f"dtype {index.dtype!r} and sizes {sizes}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the index that `dsv3 tokenize` writes, found {error!r}") from None
    largest = max(split.largest_token for split in splits.values())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(f"{folder}: expected tokens below the model's vocab_size {vocab_size}, found token {largest}")
    return index


class _Split:
    """The memory-mapped arrays of one split."""

    def __init__(self, folder: Path, name: str, index: TokenIndex) -> None:
        sizes = index.splits[name]
        self._path = path = folder / f"{name}.bin"
        self._vocab_size = index.vocab_size
        expected = sizes.num_tokens * np.dtype(index.dtype).itemsize
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise ValueError(f"{path}: expected {expected} bytes, found {found}")
        self.tokens = np.memmap(path, index.dtype, "r") if expected else np.zeros(0, index.dtype)
        self.starts, self.byte_starts = _load_offsets(folder / f"{name}.offsets.npy", sizes)

    def check(self, tokens: np.ndarray) -> Tensor:
        """Tokens that were read, for torch. ValueError where the vocabulary lacks one of them: the file is damaged."""
        if tokens.size and tokens.max() >= self._vocab_size:
            found = f"found {tokens.max()}: the file is damaged"
            raise ValueError(f"{self._path}: expected tokens below {self._vocab_size}, {found}")
        return torch.from_numpy(tokens)


def _load_offsets(path: Path, sizes: SplitIndex) -> np.ndarray:
    """int64 [2, documents + 1]. Raises ValueError where that is not what the file holds."""
    try:
        offsets = np.load(path)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: expected the offsets that `dsv3 tokenize` writes, found {error!r}") from None
    ends = offsets[:, -1].tolist() if offsets.shape == (2, sizes.num_documents + 1) else f"shape {offsets.shape}"
    if ends != [sizes.num_tokens, sizes.num_bytes]:
        expected = f"{sizes.num_documents} documents of {sizes.num_tokens} tokens and {sizes.num_bytes} bytes in all"
        raise ValueError(f"{path}: expected {expected}, found {ends}")
    return offsets


class TokenDataset:
    """Windows of seq_len + 1 tokens over the concatenated documents, in a new order every epoch.

    Consecutive windows share one token, so no token is a target twice an epoch. `fim_rate` of the documents, drawn anew every
    epoch, become prefix-suffix-middle (arXiv 2412.19437, section 4.1): two cuts at random tokens and three more tokens; the
    rest of the stream moves by as many. The windows of an epoch are as many as the stream without these tokens has, so some
    tokens are left over: at the end in the first epoch, later in front and behind, drawn anew. Everything is a pure function
    of (seed, position).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        seq_len: int,
        *,
        split: str = "train",
        seed: int = 0,
        fim_rate: float = 0.0,
        vocab_size: int | None = None,
    ) -> None:
        self.index = read_index(folder, vocab_size=vocab_size)
        self.seq_len, self.seed, self.fim_rate = seq_len, seed, fim_rate
        if fim_rate > 0 and self.index.special.fim is None:
            raise ValueError(
                f"fim_rate {fim_rate} needs fill-in-the-middle tokens, found a tokenizer without them: set fim_rate=0"
            )
        if fim_rate > 0 and vocab_size is not None and max(self.index.special.fim) >= vocab_size:
            found = f"found fill-in-the-middle token {max(self.index.special.fim)}: set fim_rate=0, or tokenize anew"
            raise ValueError(f"{folder}: expected tokens below the model's vocab_size {vocab_size}, {found}")
        self._split = _Split(Path(folder), split, self.index)
        sizes = self.index.splits[split]
        self.bytes_per_token = sizes.num_bytes / max(sizes.num_tokens, 1)
        self.windows_per_epoch = (sizes.num_tokens - 1) // seq_len  # fill-in-the-middle tokens do not count: fixed
        if self.windows_per_epoch < 1:
            raise ValueError(f"{folder}: expected at least {seq_len + 1} {split} tokens, found {sizes.num_tokens}")
        self._epoch = -1

    def batch(self, position: int, count: int) -> Tensor:
        """Windows position .. position + count - 1 of the endless stream: int64 [count, seq_len + 1]."""
        rows = np.empty((count, self.seq_len + 1), np.int64)
        for row in range(count):
            epoch, window = divmod(position + row, self.windows_per_epoch)
            self._prepare(epoch)
            rows[row] = self._read(self._begin + int(self._order[window]) * self.seq_len)
        return self._split.check(rows)

    def _prepare(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._order = np.argsort(_hash(self.seed, 2 * epoch, np.arange(self.windows_per_epoch)), kind="stable")
        lengths = np.diff(self._split.starts)
        self._draws = _hash(self.seed, 2 * epoch + 1, np.arange(3 * len(lengths))).reshape(3, -1)
        self._is_fim = (self._draws[0] < self.fim_rate * 2.0**64) & (lengths > 2)
        self._starts = np.concatenate([[0], np.cumsum(lengths + 3 * self._is_fim)])
        left_over = int(self._starts[-1]) - self.windows_per_epoch * self.seq_len - 1
        draw = int(_hash(self.seed, 2 * epoch + 1, np.arange(3 * len(lengths), 3 * len(lengths) + 1))[0])
        self._begin = draw % (left_over + 1) if epoch else 0

    def _read(self, start: int) -> np.ndarray:
        """The seq_len + 1 tokens of this epoch's stream from `start` on."""
        end = start + self.seq_len + 1
        first, last = np.searchsorted(self._starts, [start, end - 1], side="right") - 1
        parts = []
        for number in range(first, last + 1):
            low, high = start - int(self._starts[number]), end - int(self._starts[number])
            for part in self._document(number):  # only what the window takes of it is read
                parts.append(part[max(low, 0) : max(high, 0)])
                low, high = low - len(part), high - len(part)
        return np.concatenate(parts)

    def _document(self, number: int) -> list[np.ndarray]:
        """Parts that joined are the document, views of the file but for tokens that are put in."""
        tokens = self._split.tokens[self._split.starts[number] : self._split.starts[number + 1]]
        if not self._is_fim[number]:
            return [tokens]
        special = self.index.special
        assert special.fim is not None
        body = tokens[:-1] if special.bos is None else tokens[1:-1]
        low, high = sorted(int(draw % np.uint64(len(body) + 1)) for draw in self._draws[1:, number])
        before, hole, middle = (np.array([token], tokens.dtype) for token in special.fim)
        head, eos = tokens[: len(tokens) - 1 - len(body)], tokens[-1:]
        return [head, before, body[:low], hole, body[high:], middle, body[low:high], eos]


def _hash(seed: int, stream: int, values: np.ndarray) -> np.ndarray:
    """64 pseudo-random bits a value (the splitmix64 finaliser): the same on every platform and library version."""
    key = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % 2**64
    x = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class BatchReader:
    """A rank's share of the global batches: rows [rank * n/world, (rank + 1) * n/world) of each, in order.

    The position counts windows of all ranks, so a run with another world size or batch size continues where it stopped.
    """

    def __init__(self, dataset: TokenDataset, *, rank: int = 0, world_size: int = 1) -> None:
        self.dataset, self.rank, self.world_size, self.position = dataset, rank, world_size, 0

    def next(self, global_batch: int) -> Tensor:
        """int64 [global_batch / world_size, seq_len + 1], and the position moves by global_batch."""
        if global_batch % self.world_size:
            raise ValueError(f"the batch must divide by {self.world_size} ranks, found {global_batch} sequences")
        rows = global_batch // self.world_size
        batch = self.dataset.batch(self.position + self.rank * rows, rows)
        self.position += global_batch
        return batch

    def state_dict(self) -> dict[str, int | float | str]:
        """The position and what it is a position in."""
        d = self.dataset
        made = {"seed": d.seed, "seq_len": d.seq_len, "fim_rate": d.fim_rate, "tokenizer_sha": d.index.tokenizer_sha}
        return {"position": self.position, "windows_per_epoch": d.windows_per_epoch, **made}

    def load_state_dict(self, state: dict[str, int | float | str]) -> None:
        """Continue at a saved position. ValueError where the data is not what the position was counted in."""
        for key, now in self.state_dict().items():
            if key != "position" and state.get(key) != now:
                raise ValueError(f"cannot resume on other data: expected {key} {state.get(key)}, found {now}")
        self.position = int(state["position"])


class ValidationSet:
    """Every token of a split scored once, with context from its own document only; what begins a document, its bos, is no
    target. Where a tokenizer has none, an eos stands in front, as in training.

    Windows of seq_len + 1 tokens move by `stride` targets, so but for a document's first window a target sees at least
    seq_len - stride tokens. The nats of each eos count, though it has no bytes: bits per byte pays for the ends.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        seq_len: int,
        *,
        stride: int | None = None,
        split: str = "valid",
        vocab_size: int | None = None,
    ) -> None:
        self.index = read_index(folder, vocab_size=vocab_size)
        self.seq_len, self.stride = seq_len, seq_len if stride is None else stride
        if not 1 <= self.stride <= seq_len:
            raise ValueError(f"stride must be in 1..{seq_len}, found {stride}")
        self._split = _Split(Path(folder), split, self.index)
        sizes = self.index.splits[split]
        self.num_bytes = sizes.num_bytes
        self._lead = int(self.index.special.bos is None)  # tokens in front of a document
        self.num_targets = sizes.num_tokens - (1 - self._lead) * sizes.num_documents
        if self.num_bytes == 0:
            raise ValueError(f"{folder}: expected text in split {split}, found none")

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tokens int64 [b, seq_len + 1], mask bool [b, seq_len] of the targets to score), b <= batch_size."""
        for group in _groups(self._windows(), batch_size):
            tokens = np.full((len(group), self.seq_len + 1), self.index.special.eos, np.int64)
            mask = np.zeros((len(group), self.seq_len), bool)
            for row, (start, stop, first) in enumerate(group):
                absent = max(-start, 0)  # in front of the file's first document
                tokens[row, absent : stop - start] = self._split.tokens[start + absent : stop]
                mask[row, first - start - 1 : stop - start - 1] = True
            yield self._split.check(tokens), torch.from_numpy(mask)

    def _windows(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, first target) in the token file; the last window of a document reaches back to be full."""
        for first, end in pairwise(map(int, self._split.starts)):
            begin = first - self._lead  # behind the document before, whose last token is eos
            target = begin + 1
            while target < end:
                stop = min(end, target + (self.seq_len if target == begin + 1 else self.stride))
                yield max(begin, stop - self.seq_len - 1), stop, target
                target = stop

    def bits_per_byte(self, nats: float) -> float:
        """Bits per byte of the split's text, from the summed nats of all its targets."""
        return nats / math.log(2) / self.num_bytes
