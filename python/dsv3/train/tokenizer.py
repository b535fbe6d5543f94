"""Byte-level BPE: training, saving in the layout that transformers' AutoTokenizer opens, and special ids."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsv3.files import write_whole
from dsv3.train.corpus import Corpus

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|fim_prefix|>", "<|fim_hole|>", "<|fim_suffix|>")  # ids 0 to 5

# A word takes at most one character in front of it (space, dot, underscore, bracket); digits come in threes;
# punctuation takes the line break and the indentation behind it, which in source code is one event rather than ten.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t\r\n]*)?|\r?\n[ \t\r\n]*|[ \t]+(?![^\s])|\s+"
)

MAX_BYTES = 1 << 26  # of text that a tokenizer is trained on: more does not change the common pairs

# Other people's tokenizers: their names for the beginning and the end of a document.
BOS_NAMES = ("<|bos|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>")
EOS_NAMES = ("<|eos|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>")
FIM_NAMES = (
    ("<|fim_prefix|>", "<|fim_hole|>", "<|fim_suffix|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


@dataclass(frozen=True)
class SpecialIds:
    """Ids a document is packed with; `fim` is (in front of the prefix, the hole, in front of the middle)."""

    bos: int | None
    eos: int
    fim: tuple[int, int, int] | None


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE without normalisation, so that every string comes back exactly.

    The result holds at most `vocab_size` tokens including the special ones, fewer where the text has no more pairs.
    Encoding puts <|bos|> in front unless add_special_tokens is False. Raises ValueError for a vocabulary that cannot
    hold the 256 bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and special tokens), found {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return tokenizer


def train_on_corpus(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Train on the training documents of a corpus, or on every n-th where they are more than MAX_BYTES."""
    every = max(-(-corpus.num_bytes // MAX_BYTES), 1)
    return train_tokenizer((d.text for d in islice(corpus.documents("train"), 0, None, every)), vocab_size)


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str], *, max_length: int = 10**9) -> None:
    """Write tokenizer.json and tokenizer_config.json. Any tokenizer that packs documents."""
    ids = special_ids(tokenizer)
    pad = tokenizer.token_to_id(SPECIAL_TOKENS[2])
    tokens = {"bos_token": ids.bos, "eos_token": ids.eos, "pad_token": ids.eos if pad is None else pad}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.id_to_token(i) for name, i in tokens.items() if i is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def tokenizer_sha(tokenizer: Tokenizer) -> str:
    """Hex digest that names the tokenizer a token file was made with."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Look up the special tokens by the names in common use. ValueError where no end of document is known."""

    def first(names: tuple[str, ...]) -> int | None:
        return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)

    eos = first(EOS_NAMES)
    if eos is None:
        raise ValueError(f"the tokenizer needs an end-of-document token, one of {', '.join(EOS_NAMES)}; found none")
    fim = next(
        (ids for ids in (tuple(map(tokenizer.token_to_id, names)) for names in FIM_NAMES) if None not in ids), None
    )
    return SpecialIds(first(BOS_NAMES), eos, fim)


def joined_tokens(tokenizer: Tokenizer) -> dict[int, tuple[int, int]]:
    """Tokens of punctuation (with blanks around it) followed by a line break (and indentation), and the two tokens that spell
    the same; of byte-level vocabularies."""
    found = {}
    names, decoder = tokenizer.get_vocab(), decoders.ByteLevel()
    for name, token in names.items():
        joined = re.fullmatch(r"(.+?)(č?Ċ.*)", name)  # how they spell a line feed, and a carriage return before it
        if joined is None:
            continue
        punctuation, parts = decoder.decode([joined[1]]), (names.get(joined[1]), names.get(joined[2]))
        is_text = punctuation.strip() and "\ufffd" not in punctuation  # no blanks alone, no part of a character
        if is_text and not any(c.isalnum() for c in punctuation) and None not in parts:
            found[token] = parts
    return found
