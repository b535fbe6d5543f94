"""Opening the file of a tokenizer, for training text and for prompts."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a file of the `tokenizers` library, or of a folder's tokenizer.json, for texts of any length.

    Raises ValueError where there is none."""
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"expected a tokenizer.json, found none at {file}")
    try:
        return for_whole_texts(Tokenizer.from_file(str(file)))
    except Exception as error:  # the library raises plain Exception for anything wrong in the file
        raise ValueError(f"{file}: expected a file of the tokenizers library, found {error}") from None


def for_whole_texts(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, without the truncation and padding that some files ask for."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
