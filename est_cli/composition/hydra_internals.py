"""The parts of Hydra 1.3 that only its private modules offer. No other file imports `hydra._internal`.

Hydra's public `compose` has no access to the launcher, the sweeper and the run directory, and its public `main` prints
its own words for a person's mistake and exits with 1.
"""

import os

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra._internal.utils import get_args_parser as hydra_flags  # noqa: F401
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


def open_hydra(conf: str, own: str | None) -> Hydra:
    """Hydra on the folder `conf`; options in the folder `own` come before those of the same name."""
    GlobalHydra.instance().clear()
    # As hydra.main is called with: without it Hydra behaves as its version 1.0.
    version.setbase("1.3")
    Plugins.instance()
    path: ConfigSearchPathImpl = create_automatic_config_search_path(None, None, conf)
    if own is not None:
        path.prepend("command-line", f"file://{os.path.abspath(own)}", SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2("est", path)


def close_hydra() -> None:
    GlobalHydra.instance().clear()


def launcher(hydra: Hydra, master: DictConfig, task: TaskFunction) -> Launcher:
    """The launcher that the config names, to run a list of jobs that no sweeper can make."""
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(master))
    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)
