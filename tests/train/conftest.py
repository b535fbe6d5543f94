from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.train.corpus import Corpus, open_corpus
from tests.train.common import make_tokens, write_folder


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(write_folder(tmp_path_factory.mktemp("text") / "folder"))
