"""A Hugging Face `tokenizer.json`, through the `tokenizers` library."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from est_cli.data import hub
from est_cli.errors import UserError, nearest

_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_USUAL_EOT = ("<|endoftext|>", "</s>")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class HFTokenizer:
    """`eot` is the eos token of the tokenizer_config.json beside it, else `<|endoftext|>` or `</s>`.

    Special tokens that stand in a text are encoded as the text that they are.
    """

    kind = "hf"

    def __init__(self, content: str, eos_token: str | None):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(content)
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
    def open(cls, path: str | None) -> "HFTokenizer":
        """Reads a tokenizer.json, or the folder that holds it, or what a model on the hub has of both."""
        if path is None:
            raise UserError(
                "tokenizer.path: is missing; must be a tokenizer.json, its folder, or a model's name on "
                "the Hugging Face hub, for tokenizer=hf"
            )
        file = Path(os.path.expanduser(path))
        file = file / _FILE if file.is_dir() else file
        if not file.exists() and _HUB_NAME.fullmatch(path) and file.suffix != ".json":
            file = _fetch(path)
        try:
            tokenizer = cls(file.read_text("utf-8"), _eos_token(file.parent / _CONFIG_FILE, path))
        except UserError:
            raise
        except ImportError:
            raise UserError("tokenizer=hf: needs the `tokenizers` library (pip install tokenizers)") from None
        except OSError as error:
            names = os.listdir(file.parent) if file.parent.is_dir() else []
            raise UserError(
                f"tokenizer.path={path}: cannot be read ({error.strerror}){nearest(file.name, names)}"
            ) from None
        except Exception as error:  # The library raises bare Exceptions.
            raise UserError(f"tokenizer.path={path}: must be a Hugging Face tokenizer.json ({error})") from None
        if tokenizer.eot < 0:
            raise UserError(
                f"tokenizer.path={path}: must have a token that ends documents: {' or '.join(_USUAL_EOT)}, "
                f"or the eos_token of a {_CONFIG_FILE} beside it"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(
        self, texts: Sequence[str], continued: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[np.ndarray]:
        # The library splits a batch over all cores, or not at all.
        batches = [[text] for text in texts] if threads == 1 else [list(texts)]
        encodings = (
            encoding
            for batch in batches
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        )
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_text(self._content, "utf-8")
        (folder / _CONFIG_FILE).write_text(json.dumps({"eos_token": self.eos_token}) + "\n", "utf-8")

    def save_as_trained(self, folder: Path) -> None:
        """A tokenizer.json that puts nothing around a text and cuts or pads none: it gives the ids of `encode`."""
        parsed = json.loads(self._content)
        trained = {**parsed, "post_processor": _without_template(parsed.get("post_processor"))}
        trained |= {key: None for key in ("truncation", "padding") if parsed.get(key) is not None}
        content = self._content if trained == {"post_processor": None, **parsed} else json.dumps(trained)
        (folder / _FILE).write_text(content, "utf-8")

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
            elif byte_level:  # Every character of such a token stands for one byte.
                n_bytes[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                n_bytes[i] = 1
            else:
                n_bytes[i] = len(token.replace("\u2581", " ").encode())
        return n_bytes


def _fetch(name: str) -> Path:
    """The tokenizer.json of a model on the hub, its configuration beside it where there is one."""
    file = hub.fetch(name, _FILE)
    if file is not None:
        hub.fetch(name, _CONFIG_FILE)
        return file
    why = f"has no {_FILE} of such a model for you" if hub.answers() else "could not be reached"
    raise UserError(
        f"tokenizer.path={name}: there is no such file or folder{nearest(name, os.listdir())}, and the "
        f"Hugging Face hub {why}. On a machine that reaches the hub run `hf download {name} {_FILE} "
        f"{_CONFIG_FILE} --local-dir {name}` and copy the folder to {name}, below the folder that you "
        "start from; or put it elsewhere and give tokenizer.path=FOLDER"
    )


def _without_template(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor without what adds tokens to a text; those that only trim offsets stay."""
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
