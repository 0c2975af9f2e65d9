"""SentencePiece: models that are given, and byte-pair models trained here, which lose nothing of a text."""

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from est_cli.config import TokenizerConfig
from est_cli.data import Say
from est_cli.errors import UserError, nearest

# SentencePiece writes spaces as this character, so the character itself has to go as its bytes.
_SPACE_MARK = "\u2581"
_LARGEST_AUTO_VOCAB = 4096
_FIXED_PIECES = 2 + 2 + 256
"""Unknown and end of text, newline and tab, and every byte."""
_SMALLEST_VOCAB = _FIXED_PIECES + 2
_LONGEST_TRAINING_LINE = 2000
# Merges are slow on long texts (4.3 MB/s on whole source files, 0.7 on megabytes), so texts are encoded in chunks
# of at least so many characters, cut where no piece reaches across, or anywhere if that comes too late.
_CHUNK_CHARACTERS = 1024
_LONGEST_CHUNK = 1 << 16
# `normalizer_spec { add_dummy_prefix: false }`: protobuf messages merge when their bytes are joined.
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_NOTHING = np.empty(0, np.int32)
_PROBE = " \n\n  a  b\t \n c"


class SentencePieceTokenizer:
    """A SentencePiece model, as it is.

    `eot` is its end-of-sentence piece. Text that looks like a control piece (`</s>`) stays text.
    """

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
        self._boundary = self._find_boundary()
        self.token_bytes = np.array([self._bytes_of(i) for i in range(self.vocab_size)])

    @classmethod
    def open(cls, path: str) -> "SentencePieceTokenizer":
        file = Path(os.path.expanduser(path))
        try:
            tokenizer = cls(file.read_bytes())
        except OSError as error:
            names = os.listdir(file.parent) if file.parent.is_dir() else []
            raise UserError(
                f"tokenizer.path={path}: cannot be read ({error.strerror}){nearest(file.name, names)}; "
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

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(
        self, texts: Sequence[str], continued: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[np.ndarray]:
        inner: list[str] = []
        bounds = [0]
        marks: list[int] = []
        firsts: dict[int, str] = {}
        for i, text in enumerate(texts):
            for chunk in self._chunks(text):
                place = len(inner)
                if chunk == _SPACE_MARK and self._mark is not None:
                    marks.append(place)
                    chunk = ""
                elif self._has_dummy_prefix and place == bounds[-1] and not (continued and continued[i]):
                    firsts[place] = chunk
                    chunk = ""
                inner.append(chunk)
            bounds.append(len(inner))
        threads = threads or _cores()
        ids = self._encode(self._inner, inner, threads)
        for place, own in zip(firsts, self._encode(self._first, list(firsts.values()), threads), strict=True):
            ids[place] = own
        for place in marks:
            ids[place] = self._mark
        return [np.concatenate([_NOTHING, *ids[a:b]]) for a, b in itertools.pairwise(bounds)]

    @staticmethod
    def _encode(processor: sentencepiece.SentencePieceProcessor, chunks: list[str], threads: int) -> list[np.ndarray]:
        return processor.encode(chunks, out_type="numpy", num_threads=threads) if chunks else []

    def decode(self, ids: Sequence[int]) -> str:
        return self._first.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_bytes(self.proto)

    def _chunks(self, text: str) -> Iterator[str]:
        """Parts of `text` that can be encoded one by one; every space mark is a part of its own."""
        parts = re.split(f"({_SPACE_MARK})", text) if self._mark is not None and _SPACE_MARK in text else [text]
        for part in parts:
            start = 0
            while start < len(part):
                end = self._chunk_end(part, start)
                yield part[start:end]
                start = end

    def _chunk_end(self, text: str, start: int) -> int:
        if self._boundary is None:
            return len(text)
        boundary = self._boundary.search(text, start + _CHUNK_CHARACTERS, start + _LONGEST_CHUNK)
        return boundary.end() if boundary else min(start + _LONGEST_CHUNK, len(text))

    def _find_boundary(self) -> re.Pattern | None:
        """What ends where text can be cut without changing its tokens: newlines, and words before a space."""
        pieces = [self._first.id_to_piece(i) for i in range(self.vocab_size)]
        boundaries = []
        if not any("\n" in piece and len(piece) > 1 for piece in pieces):
            boundaries.append("\n")
        if not any(_SPACE_MARK in piece.lstrip(_SPACE_MARK) for piece in pieces):
            boundaries.append("[^ ](?= )")
        folds_spaces = self._first.decode(self._first.encode(_PROBE)) != _PROBE
        return None if folds_spaces or not boundaries else re.compile("|".join(boundaries))

    def _bytes_of(self, i: int) -> int:
        if self._first.is_control(i) or self._first.is_unknown(i) or self._first.is_unused(i):
            return 0
        return 1 if self._first.is_byte(i) else len(self._first.id_to_piece(i).replace(_SPACE_MARK, " ").encode())


class SentencePieceTraining:
    """A byte-pair model that is to be trained on the training split."""

    def __init__(self, config: TokenizerConfig, model_vocab_size: int):
        auto = config.vocab_size == "auto"
        self.vocab_size = min(model_vocab_size, _LARGEST_AUTO_VOCAB) if auto else config.vocab_size
        self.train_bytes = config.train_bytes
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"tokenizer.vocab_size={self.vocab_size}: must be at most model.vocab_size={model_vocab_size}"
            )
        if self.vocab_size < _SMALLEST_VOCAB:
            key = "model.vocab_size" if auto else "tokenizer.vocab_size"
            raise UserError(
                f"{key}={self.vocab_size}: must be at least {_SMALLEST_VOCAB} for tokenizer=sentencepiece, "
                f"which has {_FIXED_PIECES} ids for bytes and control; tokenizer=byte has 257"
            )
        self.definition = {
            "kind": SentencePieceTokenizer.kind,
            "vocab_size": self.vocab_size,
            "train_bytes": self.train_bytes,
        }

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
        """Lines made of the most frequent characters: at most half of the free pieces; the rest stays bytes."""
        points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        counts = np.bincount(points, minlength=1)
        # U+2585 is the trainer's own mark: it would drop every line that has one.
        for character in f"\0\n\t\u2585{_SPACE_MARK}":
            counts[ord(character) : ord(character) + 1] = 0
        # A space that is no piece would come back as its mark: it is one however rare it is.
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
