"""What a run keeps of its data: its tokenizer, and a record of the text that it trains on.

A config only names a path, and the files there can change. The weights depend on the ids of the run's tokenizer, so a
run is continued, evaluated and exported with RUN/tokenizer, and data.json tells whether its text is still the same.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.corpora import Source
from est_cli.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from est_cli.errors import UserError
from est_cli.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from est_cli.data.tokens import TokenStore

TOKENIZER, RECORD = "tokenizer", "data.json"


@dataclass(frozen=True)
class Text:
    """The text that a data config names now, or that a run recorded. Equal texts have one fingerprint."""

    fingerprint: str
    documents: int | None = field(compare=False)
    """None if the text is streamed; so is `bytes`."""
    bytes: int | None = field(compare=False)
    sources: list[dict[str, Any]] = field(compare=False)

    @classmethod
    def of(cls, sources: Sequence[Source], fingerprint: str) -> "Text":
        sizes = [getattr(source.corpus, "sizes", None) for source in sources]
        known = all(size is not None for size in sizes)
        return cls(
            fingerprint,
            sum(map(len, sizes)) if known else None,
            sum(int(size.sum()) for size in sizes) if known else None,
            [source.corpus.source for source in sources],
        )

    def difference(self, now: "Text") -> str:
        """What changed from this text to another, as far as a person can see it."""
        seen = [
            f"{old:,} {unit}, now {new:,}"
            for unit, old, new in (("documents", self.documents, now.documents), ("bytes", self.bytes, now.bytes))
            if old is not None and new is not None and old != new
        ]
        for old, new in zip(self.sources, json.loads(json.dumps(now.sources)), strict=False):
            seen += [f"{key} was {old.get(key)}, is {new.get(key)}" for key in new if old.get(key) != new.get(key)]
        return "; ".join(seen) or "as many documents and bytes, with other content"


@dataclass(frozen=True)
class RunData:
    """What the run in `folder` keeps."""

    folder: Path
    kind: str
    """Kind of its tokenizer, from its config."""

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """data.json; None for runs of versions that did not write it. Raises UserError if it is damaged."""
        path = self.folder / RECORD
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text("utf-8"))
            Text(**record["text"])
            return {"store": str(record["store"]), "tokenizer": dict(record["tokenizer"]), **record}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({type(error).__name__}: {error}); without it the run continues, "
                            "and its text is not compared") from None  # fmt: skip

    @cached_property
    def text(self) -> Text | None:
        return None if self.record is None else Text(**self.record["text"])

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None if an old run kept none. Raises UserError if it is not the one that the run trained with."""
        folder = self.folder / TOKENIZER
        if self.kind != "byte" and self.record is None and not folder.is_dir():
            return None
        tokenizer = load_tokenizer(self.kind, folder)
        if self.record is not None and tokenizer.definition != self.record["tokenizer"]:
            raise UserError(f"{folder}: is not the tokenizer that this run trained with; put its files back")
        return tokenizer

    def check(self, now: Text, data: DataConfig, say: Say) -> None:
        """Raises UserError if the run began on another text than `now`, unless data.on_change accepts that."""
        if self.text is None:
            say(f"data: {self.folder} has no {RECORD}: whether its text has changed since it began is not known")
        elif self.text != now:
            change = self.text.difference(now)
            if data.on_change == "refuse":
                raise UserError(
                    f"{key_of(data)}: the text has changed since the run in {self.folder} began: {change}; put the "
                    "text back, or give data.on_change=accept to continue on the new text with the run's own tokenizer"
                )
            say(f"data: the text has changed since the run in {self.folder} began, which is accepted: {change}")

    def tell(self, now: Text, say: Say) -> None:
        """Says if the run trained on another text than `now`."""
        if self.text is not None and self.text != now:
            say(
                f"data: the text has changed since {self.folder} trained on it: {self.text.difference(now)}; this "
                "is about the new text, read with the run's own tokenizer"
            )


def key_of(data: DataConfig) -> str:
    """The override that names the text."""
    if data.sources:
        return "data.sources"
    return f"data={data.kind}" if data.path is None else f"data.path={data.path}"


def keep_data(folder: Path, store: "TokenStore", begins: bool) -> None:
    """Records in a run's folder what it trains on. Writes its tokenizer once, when the run begins."""
    place = folder / TOKENIZER
    if begins or not place.is_dir():
        save_tokenizer(store.tokenizer, place)
    record = {"text": asdict(store.text), "store": store.fingerprint, "tokenizer": store.tokenizer.definition}
    before = {} if begins else read_json(folder / RECORD)
    # The texts that the run has trained on before, oldest first.
    earlier = before.get("earlier", [])
    if before and before["text"]["fingerprint"] != store.text.fingerprint:
        earlier = [*earlier, before["text"]]
    with replacing(folder / RECORD) as partial:
        write_json(partial, {**record, "earlier": earlier})
