import pytest

from megalm.corpus.tokenizer_training import train_byte_level_bpe
from tests.texts import documents


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert train_byte_level_bpe(documents(200), 400, path) == 400
    return str(path)
