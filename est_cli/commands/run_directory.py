"""The folder of a run: what is in it decides whether a run starts, continues or is refused."""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from est_cli.config import TrainConfig, as_plain
from est_cli.errors import UserError

if TYPE_CHECKING:
    from est_cli.data.tokenizers import Tokenizer

CONFIG, METRICS, SUMMARY, ERROR = "config.yaml", "metrics.jsonl", "summary.json", "error.txt"
ENVIRONMENT = "environment.json"
TOKENIZER = "tokenizer"

HARMLESS = (
    "format",
    "logger",
    "checkpoint",
    "run_id",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.eval_tokens",
    "trainer.checkpoint_every",
    "trainer.save_final",
    "trainer.peak_flops",
    "trainer.threads",
    "trainer.on_nonfinite",
    "data.cache_dir",
)
"""Keys, and whole sections, that may change when a run continues: they do not reach its weights."""


_BEFORE_A_RUN = {".hydra", ERROR, ENVIRONMENT, f".{CONFIG}"}
"""What a folder may hold in which no run has begun."""


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def nonfinite(self) -> Path:
        return self.path / "nonfinite"

    def check(self, config: TrainConfig) -> list[str]:
        """Whether a run of this config may start or continue here; returns what to say of changed keys.

        Raises UserError for a finished run, for one of another config, and for a folder of something else.
        """
        if not self.path.exists() or {path.name for path in self.path.iterdir()} <= _BEFORE_A_RUN:
            return []
        if not (self.path / CONFIG).exists():
            raise UserError(f"hydra.run.dir={self.path}: holds other files and no run; name another folder")
        if self.summary().get("status") == "done":
            raise UserError(
                f"run_id={config.run_id}: this run is finished ({self.path}); name another run_id, or "
                "leave it out for a fresh one"
            )
        return [f"continues with a changed {line}" for line in self._harmless_changes(config)]

    def is_done(self, config: TrainConfig) -> bool:
        """Whether this run is finished already. Raises UserError for a finished one of another config."""
        if self.summary().get("status") != "done":
            return False
        self._harmless_changes(config)
        (self.path / ERROR).unlink(missing_ok=True)
        return True

    def _harmless_changes(self, config: TrainConfig) -> list[str]:
        changed = list(differences(self.config(), as_plain(config)))
        matter = [line for key, line in changed if not _harmless(key)]
        if matter:
            raise UserError(
                f"run_id={config.run_id}: the run in {self.path} has another config; give the same "
                "values, or another run_id",
                *matter,
            )
        return [line for _, line in changed if _key(line) != "run_id"]

    def write_config(self, config: TrainConfig) -> None:
        write_whole(self.path / CONFIG, yaml.safe_dump(as_plain(config), sort_keys=False))

    def write_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """So that the run can be read without its corpus."""
        folder = self.path / TOKENIZER
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)

    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.path / CONFIG).read_text())

    def summary(self) -> dict[str, Any]:
        """summary.json, or an empty dict where there is none."""
        path = self.path / SUMMARY
        return json.loads(path.read_text()) if path.exists() else {}

    def write_summary(self, summary: dict[str, Any]) -> None:
        (self.path / ERROR).unlink(missing_ok=True)
        write_whole(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")

    def write_error(self, text: str) -> None:
        """What ended a failed run, where there is room for it."""
        with contextlib.suppress(OSError):
            (self.path / ERROR).write_text(text)


def write_whole(path: Path, text: str) -> None:
    """A process that dies here leaves the file of before, or the new one."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


def continue_command(arguments: list[str], config: TrainConfig) -> str:
    """The exact command line that goes on with a stopped run that was called with `arguments`, flags included."""
    kept = [argument for argument in arguments if not argument.startswith("run_id=")]
    by_folder = any(argument.startswith("hydra.run.dir=") for argument in kept)
    # Quoted where Hydra would read a number: 12_3, of an array job, is 123 to it.
    name = config.run_id if re.search("[A-Za-z.-]", config.run_id) else f"'{config.run_id}'"
    kept += [] if by_folder else [f"run_id={name}"]
    return shlex.join([*program(), *kept])


def program() -> list[str]:
    """How this process was called: the installed command, or python -m."""
    name = Path(sys.argv[0])
    return ["python", "-m", "est_cli"] if name.name == "__main__.py" else [name.name]


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Key and line of every value that differs between two plain configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, f"{path}: was {old}, is {new}"


def _harmless(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in HARMLESS)


def _key(line: str) -> str:
    return line.partition(":")[0]
