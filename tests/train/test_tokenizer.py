"""The tokenizer: exact round trips, special tokens, and what transformers' AutoTokenizer makes of the saved folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from dsv3.tokenizer import load_tokenizer
from dsv3.train import tokenizer as tokenizer_module
from dsv3.train.corpus import open_corpus
from dsv3.train.tokenizer import (
    SPECIAL_TOKENS,
    joined_tokens,
    save_tokenizer,
    special_ids,
    tokenizer_sha,
    train_on_corpus,
    train_tokenizer,
)

TEXT = 20 * (
    'def f(x):\n    """Doc of f."""\n    if x:\n        return {"a": 1234567}\n    y\n        z\n'
    "\n\nclass C:\n    pass\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, TEXT.upper(), "ünïcödé 漢字 🙂"], 400)


ODD = st.text(alphabet=st.sampled_from(" \n\r\t\0a_.'{}9é漢🙂\u2028\ufeff"))


@settings(max_examples=300, deadline=None)
@given(text=st.text() | ODD)
def test_every_string_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_first_ids_and_bos_goes_in_front(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(6))
    ids = special_ids(tokenizer)
    assert (ids.bos, ids.eos, ids.fim) == (0, 1, (3, 4, 5))
    assert tokenizer.encode("x<|eos|>").ids[0] == 0
    assert tokenizer.encode("x<|eos|>").ids[-1] == 1
    assert tokenizer.encode("x", add_special_tokens=False).ids[0] != 0


def test_line_break_and_indentation_are_one_token(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("(x):\n    if x:\n        return").ids[1:]]
    assert "):\n    " in pieces
    assert ":\n        " in pieces


def test_size_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= 400
    assert train_tokenizer(["ab"], 10_000).get_vocab_size() < 300
    with pytest.raises(ValueError, match=r"vocab_size must be at least 262.*found 100"):
        train_tokenizer([TEXT], 100)


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    again = train_tokenizer([TEXT, TEXT.upper(), "ünïcödé 漢字 🙂"], 400)
    assert tokenizer_sha(again) == tokenizer_sha(tokenizer)


@pytest.mark.parametrize("model_type", [None, "deepseek_v3"])
def test_auto_tokenizer_opens_the_folder(tokenizer: Tokenizer, tmp_path: Path, model_type: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path, max_length=128)
    if model_type:  # as in an exported model, where transformers picks the class by model type
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 1, 2)
    for text in (TEXT, "  a , b . \r\n\t I 'm\n\n", "\0 é 漢字 🙂 <|eos|> [UNK]"):
        ids = opened.encode(text, add_special_tokens=False)
        assert opened.decode(ids) == text
        assert opened.encode(text) == tokenizer.encode(text).ids
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_load_from_folder_and_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_sha(load_tokenizer(tmp_path)) == tokenizer_sha(load_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"expected a tokenizer.json, found none at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken.json: expected a file of the tokenizers library"):
        load_tokenizer(tmp_path / "broken.json")


def test_special_tokens_of_other_tokenizers() -> None:
    vocab = {"a": 0, "<s>": 1, "</s>": 2}
    assert special_ids(Tokenizer(models.BPE(vocab, []))).bos == 1
    assert special_ids(Tokenizer(models.BPE(vocab, []))).eos == 2
    assert special_ids(Tokenizer(models.BPE(vocab, []))).fim is None
    with pytest.raises(ValueError, match=r"needs an end-of-document token, one of .*; found none"):
        special_ids(Tokenizer(models.BPE({"a": 0}, [])))


def test_joined_tokens_spell_the_same(tokenizer: Tokenizer) -> None:
    joined = joined_tokens(tokenizer)
    assert any(":\n" in tokenizer.decode([token]) for token in joined)
    for token, (first, second) in joined.items():
        assert tokenizer.decode([token]) == tokenizer.decode([first, second])
        assert tokenizer.decode([second])[0] == "\n"


def test_joined_tokens_are_told_by_what_they_spell() -> None:
    """Byte-level vocabularies spell blanks, carriage returns and all but ASCII as letters."""
    split = {" {\n": (" {", "\n"), ";\r\n": (";", "\r\n"), "。\n  ": ("。", "\n  "), "):\n": ("):", "\n")}
    whole = [" \n", "\r\n", "a\n", "é\n", "\n", "x:\n", "?\n"]  # the last without the ? alone
    parts = {part for pair in split.values() for part in pair} | {" ", "\r", "a", "é", "x:"}
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = {"".join(name for name, _ in to_bytes.pre_tokenize_str(text)): text for text in {*split, *whole, *parts}}
    names |= {"ãĢ": "\ufffd", "ãĢĊ": "\ufffd\n"}  # the first bytes of a character
    ids = {name: i for i, name in enumerate(sorted(names))}
    found = joined_tokens(Tokenizer(models.BPE(ids, [])))
    by_id = {i: names[name] for name, i in ids.items()}
    assert {by_id[token]: tuple(by_id[part] for part in pair) for token, pair in found.items()} == split


def test_a_large_corpus_is_thinned_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(100):
        (tmp_path / f"f{i}.txt").write_text(f"document number {i:02d}")
    corpus = open_corpus(tmp_path)
    monkeypatch.setattr(tokenizer_module, "MAX_BYTES", corpus.num_bytes // 2 + 1)
    seen: list[str] = []
    monkeypatch.setattr(tokenizer_module, "train_tokenizer", lambda texts, size: seen.extend(texts))
    train_on_corpus(corpus, 300)
    assert 0 < sum(map(len, seen)) <= tokenizer_module.MAX_BYTES
