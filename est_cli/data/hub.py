"""The Hugging Face hub: whether it answers, and single files from it."""

import functools
import threading
from pathlib import Path

_TIMEOUT_S = 4


@functools.cache
def answers() -> bool:
    """Whether the hub can be reached. Asked once: the libraries would each try for half a minute."""
    found: list[bool] = []
    # Looking up a name has no timeout of its own, so the thread is left behind where that takes too long.
    asking = threading.Thread(target=lambda: found.append(_ask()), daemon=True)
    asking.start()
    asking.join(2 * _TIMEOUT_S)
    return found == [True]


def _ask() -> bool:
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception:  # What a session raises depends on the library that it wraps.
        return False
    return True


def dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a dataset is; where the hub does not say, the revision."""
    import huggingface_hub

    if not answers():
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_S).sha
    except Exception:  # Whatever is wrong with the name, loading the dataset says it better.
        return revision


def fetch(name: str, filename: str) -> Path | None:
    """A file of the model `name`: from the cache, else from the hub, or None where neither has it."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, filename)
    if isinstance(cached, str):
        return Path(cached)
    if not answers():
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, etag_timeout=_TIMEOUT_S))
    except Exception:  # No such model or file, no right to read it, or a network that went away.
        return None
