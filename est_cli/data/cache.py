"""The folder that prepared text is kept in."""

import os
from pathlib import Path

import platformdirs

from est_cli.config import DataConfig


def cache_folder(data: DataConfig) -> Path:
    """Where token files are kept."""
    if data.cache_dir is None:
        return platformdirs.user_cache_path("est-cli", appauthor=False)
    return Path(os.path.abspath(os.path.expanduser(data.cache_dir)))
