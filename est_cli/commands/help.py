"""--help: the template of the command's config, where each key stands with the comment of its YAML file."""

import re
from pathlib import Path
from string import Template
from typing import Any

from omegaconf import OmegaConf

from est_cli.commands.composition import Composer, conf_dir

_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):")
_COMMENTED = re.compile(r"(?P<key>\w+):.*?\s# (?P<comment>.+)")
_COMMENT_COLUMN = 34


def help_text(config_name: str, arguments: Any) -> str:
    """What the command does, its config groups, and the composed config. Raises UserError for bad overrides."""
    with Composer(config_name, arguments) as composer:
        config = composer.compose()
        groups = composer.hydra.format_config_groups(lambda name: not name.startswith("hydra"))
    keys = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    top_level = _comments([conf_dir() / f"{name}.yaml" for name in (config_name, "base")])
    sections = {
        group: _comments([conf_dir() / group / f"{option}.yaml", *sorted((conf_dir() / group).glob("*.yaml"))])
        for group, option in config.hydra.runtime.choices.items()
        if "/" not in group
    }
    template = Template(config.hydra.help.template)
    return template.substitute(APP_CONFIG_GROUPS=groups, CONFIG=_annotated(keys, top_level, sections))


def _annotated(yaml: str, top_level: dict[str, str], sections: dict[str, dict[str, str]]) -> str:
    """The lines of a composed config, each with the comment of its key."""
    lines, section = [], {}
    for line in yaml.splitlines():
        comment = None
        if found := _KEY.match(line):
            depth, key = len(found["indent"]) // 2, found["key"]
            if depth == 0:
                section, comment = sections.get(key, {}), top_level.get(key)
            elif depth == 1:
                comment = section.get(key)
        lines.append(line if comment is None else f"{line:<{_COMMENT_COLUMN}}# {comment}")
    return "\n".join(lines) + "\n"


def _comments(paths: list[Path]) -> dict[str, str]:
    """The comment behind each key; of several files the first that has one."""
    comments: dict[str, str] = {}
    for path in filter(Path.is_file, paths):
        for line in path.read_text("utf-8").splitlines():
            if found := _COMMENTED.match(line):
                comments.setdefault(found["key"], found["comment"])
    return comments
