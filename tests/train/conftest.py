from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.common import make_tokens


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("corpus"))
