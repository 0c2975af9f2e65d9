"""Tokenizers: text → ids and back, without loss. Bytes, SentencePiece (given or trained here), Hugging Face."""

import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from est_cli.config import TokenizerConfig
from est_cli.config.auto import n_cores
from est_cli.data import Say, hub
from est_cli.errors import UserError, nearest

# SentencePiece writes spaces as this character, so the character itself is encoded as its bytes.
_SPACE_MARK = "\u2581"
_LARGEST_AUTO_VOCAB = 4096
_FIXED_PIECES = 2 + 2 + 256
"""Unknown and end of text, newline and tab, and every byte."""
_SMALLEST_VOCAB = _FIXED_PIECES + 2
_LONGEST_TRAINING_LINE = 2000
# Merging is slow on long texts (4.3 MB/s on whole source files, 0.7 on megabytes). Texts are therefore encoded in
# chunks of at least this many characters, cut where no piece can cross, or anywhere if that takes too long.
_CHUNK_CHARACTERS = 1024
_LONGEST_CHUNK = 1 << 16
# `normalizer_spec { add_dummy_prefix: false }`: protobuf messages merge when their bytes are concatenated.
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_NOTHING = np.empty(0, np.int32)
_PROBE = " \n\n  a  b\t \n c"
_CONFIG_FILE = "tokenizer_config.json"
_USUAL_EOT = ("<|endoftext|>", "</s>")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Tokenizer(Protocol):
    kind: str
    vocab_size: int
    eot: int
    """The token that ends every document."""
    definition: dict
    """What its ids depend on, for fingerprints."""
    token_bytes: np.ndarray
    """int64 [vocab_size]: UTF-8 bytes of text in each token; control tokens 0."""
    threads: int | None = None
    """How many encode a batch; None means one per core."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] = ()) -> list[np.ndarray]:
        """Ids of each text. Those that are `continued` (default: none) are not the first part of their document."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Writes the files that `load_tokenizer` reads."""


class ByteTokenizer(Tokenizer):
    """Token i is byte i, and 256 ends a document. Has no files."""

    kind = "byte"
    vocab_size = 257
    eot = 256
    definition = {"kind": "byte"}  # noqa: RUF012
    token_bytes = np.array([1] * 256 + [0])

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] = ()) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < self.eot).decode("utf-8", "replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. `eot` is its end-of-sentence piece; text that looks like a control piece stays text."""

    kind = "sentencepiece"
    FILE = "tokenizer.model"

    def __init__(self, proto: bytes):
        self.proto = proto
        self._first = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=proto + _WITHOUT_DUMMY_PREFIX)
        self.vocab_size = self._first.get_piece_size()
        self.eot = self._first.eos_id()
        self.definition = {"kind": self.kind, "sha256": hashlib.sha256(proto).hexdigest()}
        self._has_dummy_prefix = self._first.encode("a") != self._inner.encode("a")
        mark_ids = [self._first.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark = np.array(mark_ids, np.int32) if all(map(self._first.is_byte, mark_ids)) else None
        self._chunk = self._chunk_pattern()
        self.token_bytes = np.array([self._bytes_of(i) for i in range(self.vocab_size)])

    @classmethod
    def open(cls, path: str) -> "SentencePieceTokenizer":
        file = Path(os.path.expanduser(path))
        try:
            tokenizer = cls(file.read_bytes())
        except OSError as error:
            raise UserError(
                f"tokenizer.path={path}: cannot be read {_reason(error, file)}; "
                "must be a SentencePiece model: place it there, or give "
                f"tokenizer.path=FILE. Llama's is the {cls.FILE} that `hf download "
                f"TinyLlama/TinyLlama_v1.1 {cls.FILE} --local-dir FOLDER` brings"
            ) from None
        except (RuntimeError, ValueError):
            raise UserError(
                f"tokenizer.path={path}: must be a SentencePiece model (tokenizer=hf reads a tokenizer.json)"
            ) from None
        if tokenizer.eot < 0:
            raise UserError(f"tokenizer.path={path}: must have an end-of-sentence piece to end documents with")
        return tokenizer

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] = ()) -> list[np.ndarray]:
        inner: list[str] = []
        bounds = [0]
        marks: list[int] = []
        firsts: dict[int, str] = {}
        for text, is_continued in itertools.zip_longest(texts, continued, fillvalue=False):
            for chunk in self._chunks(text):
                place = len(inner)
                if chunk == _SPACE_MARK and self._mark is not None:
                    marks.append(place)
                    chunk = ""
                elif self._has_dummy_prefix and place == bounds[-1] and not is_continued:
                    firsts[place] = chunk
                    chunk = ""
                inner.append(chunk)
            bounds.append(len(inner))
        as_arrays = {"out_type": "numpy", "num_threads": self.threads or n_cores()}
        ids = self._inner.encode(inner, **as_arrays)
        for place, own in zip(firsts, self._first.encode(list(firsts.values()), **as_arrays), strict=True):
            ids[place] = own
        for place in marks:
            ids[place] = self._mark
        return [np.concatenate([_NOTHING, *ids[a:b]]) for a, b in itertools.pairwise(bounds)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._first.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_bytes(self.proto)

    def _chunks(self, text: str) -> list[str]:
        """Parts of `text` that can be encoded separately; each space mark is a part of its own."""
        parts = re.split(f"({_SPACE_MARK})", text) if self._mark is not None and _SPACE_MARK in text else [text]
        if self._chunk is None:
            return [part for part in parts if part]
        return [chunk for part in parts for chunk in self._chunk.findall(part)]

    def _chunk_pattern(self) -> re.Pattern | None:
        """Matches text up to where it can be cut without changing tokens: after a newline, or a word before a space."""
        pieces = [self._first.id_to_piece(i) for i in range(self.vocab_size)]
        boundaries = []
        if not any("\n" in piece and len(piece) > 1 for piece in pieces):
            boundaries.append("\n")
        if not any(_SPACE_MARK in piece.lstrip(_SPACE_MARK) for piece in pieces):
            boundaries.append("[^ ](?= )")
        if not boundaries or self._first.decode(self._first.encode(_PROBE)) != _PROBE:  # it folds spaces
            return None
        inside = f".{{{_CHUNK_CHARACTERS},{_LONGEST_CHUNK - 1}}}?(?:{'|'.join(boundaries)})"
        return re.compile(f"{inside}|.{{1,{_LONGEST_CHUNK}}}", re.DOTALL)

    def _bytes_of(self, i: int) -> int:
        if self._first.is_control(i) or self._first.is_unknown(i) or self._first.is_unused(i):
            return 0
        return 1 if self._first.is_byte(i) else len(self._first.id_to_piece(i).replace(_SPACE_MARK, " ").encode())


class SentencePieceTraining:
    """The training of a byte-pair model on the training split."""

    def __init__(self, config: TokenizerConfig, model_vocab_size: int):
        auto = config.vocab_size == "auto"
        self.vocab_size = min(model_vocab_size, _LARGEST_AUTO_VOCAB) if auto else config.vocab_size
        self.train_bytes = config.train_bytes
        if self.vocab_size < _SMALLEST_VOCAB:
            key = "model.vocab_size" if auto else "tokenizer.vocab_size"
            raise UserError(
                f"{key}={self.vocab_size}: must be at least {_SMALLEST_VOCAB} for tokenizer=sentencepiece, "
                f"which has {_FIXED_PIECES} ids for bytes and control; tokenizer=byte has 257"
            )
        self.definition = {"kind": "sentencepiece", "vocab_size": self.vocab_size, "train_bytes": self.train_bytes}

    def train(self, texts: Sequence[str], say: Say) -> SentencePieceTokenizer:
        """`texts` should be a sample of the training split of at most `train_bytes`."""
        say(f"tokenizer: training {self.vocab_size} pieces on {sum(map(len, texts)) / 1e6:.1f} M characters")
        lines = self._training_lines(texts)
        try:
            proto = _train(lines, self.vocab_size)
        except RuntimeError as error:
            highest = re.search(r"value <= (\d+)", str(error))
            if highest is None:
                raise
            say(
                f"tokenizer.vocab_size: lowered from {self.vocab_size} to {highest[1]}, "
                "all that a text this small supports"
            )
            proto = _train(lines, int(highest[1]))
        return SentencePieceTokenizer(proto)

    def _training_lines(self, texts: Sequence[str]) -> list[str]:
        """Lines that only hold the most frequent characters, at most half of the free pieces; the others stay bytes."""
        points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        counts = np.bincount(points, minlength=1)
        # U+2585 is the trainer's own mark: it drops every line that has one.
        for character in f"\0\n\t\u2585{_SPACE_MARK}":
            counts[ord(character) : ord(character) + 1] = 0
        # The space must be a piece, however rare it is: otherwise it would come back as its mark.
        counts = np.pad(counts, (0, max(0, ord(" ") + 1 - len(counts))))
        counts[ord(" ")] = counts.max() + 1
        frequent = np.argsort(-counts, kind="stable")[: (self.vocab_size - _FIXED_PIECES) // 2]
        kept = "".join(re.escape(chr(point)) for point in frequent if counts[point])
        lines = [line for text in texts for line in re.split(f"[^{kept}]+", text)] if kept else []
        longest = _LONGEST_TRAINING_LINE
        parts = [line[i : i + longest] for line in lines for i in range(0, len(line), longest)]
        return parts if any(" " in part for part in parts) else [*parts, " "]


def _train(lines: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=["\n", "\t"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        input_sentence_size=0,
        max_sentence_length=4 * _LONGEST_TRAINING_LINE + 1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class HFTokenizer(Tokenizer):
    """A tokenizer.json.

    `eot` is the eos token of the tokenizer_config.json beside it, else `<|endoftext|>` or `</s>`. Special tokens in a
    text are encoded as ordinary text.
    """

    kind = "hf"
    FILE = "tokenizer.json"

    def __init__(self, content: str, eos_token: str | None):
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._content = content
        ids = [self._tokenizer.token_to_id(token) for token in (eos_token, *_USUAL_EOT) if token]
        self.eot = next((i for i in ids if i is not None), -1)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        digest = hashlib.sha256(content.encode()).hexdigest()
        self.definition = {"kind": self.kind, "sha256": digest, "eot": self.eot}
        self.token_bytes = self._count_bytes()

    @classmethod
    def open(cls, path: str) -> "HFTokenizer":
        """Reads a tokenizer.json, its folder, or the files of a model on the hub."""
        file = Path(os.path.expanduser(path))
        file = file / cls.FILE if file.is_dir() else file
        if not file.exists() and _HUB_NAME.fullmatch(path) and file.suffix != ".json":
            file = _fetch(path)
        try:
            tokenizer = cls(file.read_text("utf-8"), _eos_token(file.parent / _CONFIG_FILE, path))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"tokenizer.path={path}: cannot be read {_reason(error, file)}") from None
        except Exception as error:  # The library raises bare Exceptions.
            raise UserError(f"tokenizer.path={path}: must be a Hugging Face tokenizer.json ({error})") from None
        if tokenizer.eot < 0:
            raise UserError(
                f"tokenizer.path={path}: must have a token that ends documents: {' or '.join(_USUAL_EOT)}, "
                f"or the eos_token of a {_CONFIG_FILE} beside it"
            )
        return tokenizer

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] = ()) -> list[np.ndarray]:
        # The library splits a batch over all cores, or not at all.
        batches = [[text] for text in texts] if self.threads == 1 else [list(texts)]
        encode = partial(self._tokenizer.encode_batch_fast, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for batch in batches for encoding in encode(batch)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(self._content, "utf-8")
        (folder / _CONFIG_FILE).write_text(json.dumps({"eos_token": self.eos_token}) + "\n", "utf-8")

    def save_as_trained(self, folder: Path) -> None:
        """Writes a tokenizer.json that gives the ids of `encode`: it adds nothing to a text and does not cut or pad."""
        parsed = json.loads(self._content)
        trained = {**parsed, "post_processor": _without_template(parsed.get("post_processor"))}
        trained |= {key: None for key in ("truncation", "padding") if parsed.get(key) is not None}
        content = self._content if trained == {"post_processor": None, **parsed} else json.dumps(trained)
        (folder / self.FILE).write_text(content, "utf-8")

    @property
    def eos_token(self) -> str:
        return self._tokenizer.id_to_token(self.eot)

    @property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def _count_bytes(self) -> np.ndarray:
        parsed = json.loads(self._tokenizer.to_str())
        byte_level = '"ByteLevel"' in json.dumps(parsed.get("decoder"))
        added = self._tokenizer.get_added_tokens_decoder()
        n_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                n_bytes[i] = 0 if added[i].special else len(added[i].content.encode())
            elif byte_level:  # each character of such a token is one byte
                n_bytes[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                n_bytes[i] = 1
            else:
                n_bytes[i] = len(token.replace("\u2581", " ").encode())
        return n_bytes


def _fetch(name: str) -> Path:
    """The tokenizer.json of a model on the hub, with its tokenizer_config.json beside it if there is one."""
    file = hub.fetch(name, HFTokenizer.FILE)
    if file is not None:
        hub.fetch(name, _CONFIG_FILE)
        return file
    why = f"has no {HFTokenizer.FILE} of such a model for you" if hub.answers() else "could not be reached"
    raise UserError(
        f"tokenizer.path={name}: there is no such file or folder{nearest(name, os.listdir())}, and the "
        f"Hugging Face hub {why}. {hub.how_to_place(name, f'{HFTokenizer.FILE} {_CONFIG_FILE}', 'tokenizer.path')}"
    )


def _without_template(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor without the parts that add tokens to a text; those that only trim offsets stay."""
    if processor is not None and processor["type"] == "Sequence":
        left = [kept for part in processor["processors"] if (kept := _without_template(part)) is not None]
        return {**processor, "processors": left} if left else None
    return processor if processor is not None and processor["type"] == "ByteLevel" else None


def _eos_token(config: Path, path: str) -> str | None:
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text("utf-8")).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer.path={path}: {config} cannot be read ({error})") from None
    if not isinstance(token, str | None):
        raise UserError(f"tokenizer.path={path}: {config}: eos_token={token}: must be a text")
    return token


def choose_tokenizer(config: TokenizerConfig, model_vocab_size: int) -> Tokenizer | SentencePieceTraining:
    """The tokenizer that the config names, or the training that will make it.

    Raises UserError if it has more ids than the model, or its file cannot be read.
    """
    if config.kind == "sentencepiece" and config.path is None:
        return SentencePieceTraining(config, model_vocab_size)
    tokenizer = ByteTokenizer() if config.kind == "byte" else _TOKENIZERS[config.kind].open(config.path)
    if tokenizer.vocab_size > model_vocab_size:
        name = f"tokenizer.path={config.path}" if config.path else f"tokenizer={config.kind}"
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} ids, and must have at most model.vocab_size={model_vocab_size}"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files into a new folder, which replaces `folder` once it is complete."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    tokenizer.save(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def load_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """A tokenizer that `save` wrote into `folder`."""
    return ByteTokenizer() if kind == "byte" else _TOKENIZERS[kind].open(str(folder / _TOKENIZERS[kind].FILE))


_TOKENIZERS = {"sentencepiece": SentencePieceTokenizer, "hf": HFTokenizer}


def _reason(error: OSError, file: Path) -> str:
    names = os.listdir(file.parent) if file.parent.is_dir() else []
    return f"({error.strerror}){nearest(file.name, names)}"
