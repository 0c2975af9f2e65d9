"""est-train --rerun DIR: the config that a run recorded becomes the primary one, which the overrides change."""

import hashlib
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from est_cli.composition.typed_text import typed_keys
from est_cli.config import CONFIG_FILE, read_config_file
from est_cli.errors import UserError

_OF_THE_CALL = ("run_id", "format")
"""Keys that say how a run was called, not what it computes."""
_RATES = ("sampling", "sampling.heads", "sampling.mlp", "sampling.layers")


def recorded_config(run_dir: str, overrides: list[str]) -> str:
    """The name of a primary config, made for this process, that composes to DIR/config.yaml.

    Raises UserError if DIR holds no run, and for overrides that cannot reach what is recorded.
    """
    file = Path(run_dir) / CONFIG_FILE
    if not file.exists():
        raise UserError(f"--rerun={run_dir}: is no run directory: there is no {CONFIG_FILE} in it")
    config = read_config_file(file.parent, f"--rerun={run_dir}")
    if not isinstance(config.get("model"), dict):
        raise UserError(f"--rerun={run_dir}: its {CONFIG_FILE} is not that of a run of est-train")
    _check_overrides(run_dir, overrides)
    return store_config(f"rerun-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}", without_call(config))


def _check_overrides(run_dir: str, overrides: list[str]) -> None:
    """The stages are recorded as numbers, so the keys that they were made from no longer reach them."""
    keys = set(typed_keys(overrides))
    if "scheduler" in keys:
        return
    dead = [key for key in sorted(keys) if key in _RATES or (key.startswith("scheduler.") and "stages" not in key)]
    if dead:
        again = "also name the scheduler, which makes them again, as in scheduler=three_stage"
        raise UserError(*(f"{key}: does not reach the stages that {run_dir} recorded; {again}" for key in dead))


def without_call(config: dict) -> dict:
    """`config` without the keys of the call, and without a head width or shard size that follows from other keys."""
    model, trainer = config["model"], config.get("trainer", {})
    if model.get("head_dim") == model.get("d_model", 0) // max(1, model.get("n_heads", 1)):
        config = {**config, "model": {**model, "head_dim": None}}
    if "shard_size" in trainer and trainer.get("strategy") != "hsdp":
        config = {**config, "trainer": {**trainer, "shard_size": "auto"}}
    return {key: value for key, value in config.items() if key not in _OF_THE_CALL}


def store_config(name: str, config: dict) -> str:
    """Make `config` a primary one for this process; returns its name.

    Its sections become options of the config groups, so that a group can still be exchanged as a whole.
    """
    store = ConfigStore.instance()
    groups = {key: value for key, value in config.items() if isinstance(value, dict)}
    for group, section in groups.items():
        store.store(group=group, name=name, node=OmegaConf.create(section))
    rest = {key: value for key, value in config.items() if key not in groups}
    defaults = ["train", *({f"override /{group}": name} for group in groups), "_self_"]
    store.store(name=name, node=OmegaConf.create({"defaults": defaults, **rest}))
    return name
