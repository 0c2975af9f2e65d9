"""The trackers that a configuration asks for."""

from est_cli.config import TrainConfig
from est_cli.tracking.csv_tracker import CsvTracker
from est_cli.tracking.display import Display, console_for
from est_cli.tracking.metrics import MetricsFile
from est_cli.tracking.tensorboard_tracker import TensorBoardTracker
from est_cli.tracking.tracker import Tracker
from est_cli.tracking.wandb_tracker import WandbTracker


def trackers_for(config: TrainConfig, label: str | None = None) -> list[Tracker]:
    """In the order in which they are to be called: the display last, so that it shows what the others say.

    `label` tells the lines of a run from those of others that print to the same terminal at the same time.
    Raises UserError where a library that the configuration asks for is not installed.
    """
    display = Display(console_for(config.format), label=label)
    trackers: list[Tracker] = [MetricsFile(display.say)]
    match config.logger.kind:
        case "wandb" if config.logger.mode != "disabled":
            trackers.append(WandbTracker(display.say))
        case "tensorboard":
            trackers.append(TensorBoardTracker(display.say))
        case "csv":
            trackers.append(CsvTracker(display.say))
    return [*trackers, display]
