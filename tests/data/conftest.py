"""Small corpora and tokenizers that the tests of est_cli.data share."""

from functools import partial

import hypothesis
import pytest
import tiny_corpora
from tiny_corpora import prose

from est_cli.config import DataConfig, TokenizerConfig
from est_cli.data.corpora import FileCorpus
from est_cli.data.splits import split_corpus
from est_cli.data.tokenizers import SentencePieceTokenizer, SentencePieceTraining

# A machine that does other work too is no error.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """Forty files in two folders, 60 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        file = folder / ("sub" if i % 3 else ".") / f"{i:02}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(prose(20 + i, seed=i), "utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(corpus_folder):
    """A SentencePiece tokenizer as `tokenizer=sentencepiece` trains it."""
    files = sorted(corpus_folder.rglob("*.txt"))
    train, _ = split_corpus(FileCorpus(files, {"kind": "text"}), 0.1)
    texts = [piece.text for piece in train.pieces()]
    return SentencePieceTraining(TokenizerConfig("sentencepiece", vocab_size=400), 512).train(texts, lambda _: None)


@pytest.fixture(scope="session")
def llama_model():
    return tiny_corpora.llama_model()


@pytest.fixture
def llama_file(tmp_path, llama_model):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(llama_model)
    return file


@pytest.fixture(scope="session")
def llama(llama_model):
    return SentencePieceTokenizer(llama_model)


@pytest.fixture
def said():
    """Collects messages: pass `said.append` as `say`."""
    return []


@pytest.fixture
def text_data(tmp_path):
    """Makes a DataConfig of kind text whose cache is the test's own."""
    return partial(_data, "text", str(tmp_path / "cache"))


@pytest.fixture
def hf_data(tmp_path):
    """Makes a DataConfig of kind hf whose cache is the test's own."""
    return partial(_data, "hf", str(tmp_path / "cache"))


def _data(kind: str, cache: str, path, **options) -> DataConfig:
    return DataConfig(kind=kind, path=path if isinstance(path, tuple) else str(path), cache_dir=cache, **options)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """Token files of tests are small and many, and no test ends with a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)
