from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsv3.inference.text import TextStream, encode
from dsv3.tokenizer import load_tokenizer

EOS = 256


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; token 256 is the special <|eos|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = iter(b for b in range(256) if b not in single.values())
    vocab = {c: single[c] if c in single else next(others) for c in alphabet}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eos|>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


def _pieces(data: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream, pieces = TextStream(TOKENIZER, stop), []
    for token in data:
        stream.push([token])
        pieces.append(stream.take())
    pieces.append(stream.take(final=True))
    return pieces, stream


def test_tokens_are_bytes():
    assert encode(TOKENIZER, "aé 漢\n") == list("aé 漢\n".encode())


@settings(deadline=None)
@given(st.text(max_size=30))
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    pieces, stream = _pieces(list(text.encode("utf-8", "ignore")))
    assert "".join(pieces) == stream.text == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def fallback_tokenizer() -> Tokenizer:
    """As SentencePiece makes them: tokens of characters, and of bytes (<0x00> ...) for what has none."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {character: 256 + i for i, character in enumerate("ab c▁")}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=None))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("text", ["a😀b", "日本 c", "é", "a漢"])
def test_characters_of_byte_tokens(text):
    """Decoded one by one they are a replacement character each; what is shown is the character, and a stop string is found."""
    tokenizer = fallback_tokenizer()
    ids = tokenizer.encode(text).ids
    assert len(ids) > len(text)
    stream, pieces = TextStream(tokenizer), []
    for token in ids:
        stream.push([token])
        pieces.append(stream.take())
    pieces.append(stream.take(final=True))
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    stopped = TextStream(tokenizer, (text[-2:],))
    for token in ids:
        stopped.push([token])
    assert stopped.stopped
    assert stopped.text == text[:-2]


@settings(deadline=None)
@given(st.lists(st.integers(0, EOS), max_size=40))
def test_any_bytes_join_to_what_the_tokenizer_decodes(data):
    pieces, stream = _pieces(data)
    assert "".join(pieces) == stream.text == TOKENIZER.decode(data)


def test_a_character_appears_with_its_last_byte():
    pieces, _ = _pieces(list("a😀b".encode()))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_special_tokens_are_left_out():
    assert _pieces([97, EOS, 98])[0] == ["a", "", "b", ""]


def test_a_space_behind_a_special_token_stays():
    """Decoders that drop the space of their first piece, as Llama's does."""
    words = ["\u2581Hello", "\u2581world", "\u2581again"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<|eos|>"])
    ids = [0, 1, 3, 2, 1]
    stream = TextStream(tokenizer)
    for token in ids:
        stream.push([token])
    stream.take(final=True)
    assert stream.text == tokenizer.decode(ids) == "Hello world again world"


@settings(deadline=None)
@given(st.text("abé", max_size=20), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    data = list(text.encode())
    pieces, stream = _pieces(data, tuple(stop))
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
    expected = text
    if ends:
        seen = text[: ends[0]]
        expected = seen[: min(len(seen) - len(s) for s in stop if seen.endswith(s))]
    assert stream.stopped == bool(ends)
    assert "".join(pieces) == stream.text == expected


def test_load_tokenizer_from_a_file_or_its_folder(tmp_path: Path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        assert load_tokenizer(path).encode("hé").ids == list("hé".encode())
    with pytest.raises(ValueError, match=r"expected a tokenizer.json, found none at .*missing"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("")
    with pytest.raises(ValueError, match=r"tokenizer.json: expected a file of the tokenizers library, found EOF"):
        load_tokenizer(tmp_path)
