"""How a config is read: plain values → types → checks across sections → chosen values. Imports no torch.

sections   the frozen dataclasses, whose types say what is allowed
checks     values that are allowed on their own and clash with each other
reading    plain values → sections; collects every problem before it raises one UserError; config.yaml of a run
auto       `auto` values → numbers that suit the device, so that a run directory's config holds numbers only

Each file imports only those above it. `auto` needs est_cli.subnet to count FLOPs, which needs the sections, so it is
imported by its own name.
"""

from est_cli.config.reading import (  # noqa: F401
    CONFIG_FILE,
    check_value,
    read_config_file,
    read_train_config,
    what_replaced,
)
from est_cli.config.sections import (  # noqa: F401
    CheckpointConfig,
    Count,
    DataConfig,
    Format,
    LoggerConfig,
    ModelConfig,
    Natural,
    NotNegative,
    OptimizerConfig,
    Positive,
    Rescale,
    RescaleConfig,
    SamplingConfig,
    SchedulerConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
    as_plain,
)
