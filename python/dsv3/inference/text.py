"""Text in and out: tokenizers, and incremental decoding that never splits a character."""

from __future__ import annotations

from typing import Any, Protocol

_PARTIAL = "\ufffd"  # what a decoder gives for bytes that are not UTF-8, such as the first half of a character


class Tokenizer(Protocol):
    """A `tokenizers.Tokenizer`, or anything with these two methods, such as a tokenizer of transformers."""

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str: ...


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer itself adds. ValueError for a text that came from
    bytes which are not UTF-8: Python spells those as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start : error.end]
        raise ValueError(f"expected a prompt of UTF-8 text, found {found!a} at character {error.start}") from None
    encoding = tokenizer.encode(text)
    return list(getattr(encoding, "ids", encoding))


class TextStream:
    """The text of a growing list of tokens. Special tokens are left out.

    A character whose bytes span several tokens appears when its last byte does; text that may become a stop string is held
    back. The pieces joined are the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._ids: list[int] = []
        self._prefix = self._read = 0  # ids from _prefix on are decoded, those before _read only as context
        self._done = 0  # characters of decode(ids[_prefix:]) that are in `text`
        self._given = 0

    def push(self, ids: list[int]) -> None:
        """Adds tokens; sets `stopped` and cuts `text` where a stop string begins."""
        if self.stopped:
            return
        self._ids += ids
        decoded = self._decode()
        whole = not decoded.endswith(_PARTIAL)
        # An unfinished character is one replacement character, or one for each of its bytes.
        self._extend(decoded if whole else decoded.rstrip(_PARTIAL))
        if whole:
            # What has no text (special tokens) is no context: some decoders drop the first piece's space.
            if self._tokenizer.decode(self._ids[self._read :], skip_special_tokens=True):
                self._prefix = self._read
            self._read = len(self._ids)
            self._done = len(self._decode())

    def take(self, *, final: bool = False) -> str:
        """The text that has become safe to show since the last call; with `final`, all the rest."""
        if final and not self.stopped:
            self._extend(self._decode())
        end = len(self.text) - (0 if final or self.stopped else self._hold)
        piece = self.text[self._given : max(end, self._given)]
        self._given += len(piece)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._prefix :], skip_special_tokens=True)

    def _extend(self, decoded: str) -> None:
        old = len(self.text)
        self.text += decoded[self._done :]
        self._done = max(self._done, len(decoded))
        found = [i for s in self._stop if (i := self.text.find(s, max(0, old - len(s) + 1))) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
