"""Stands in for wandb: writes what is called to the file FAKE_WANDB_CALLS, and misbehaves as FAKE_WANDB says."""

import json
import os
import time
from types import SimpleNamespace

FAULT = os.environ.get("FAKE_WANDB", "")


def _call(called, **options):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps({"called": called, **options}) + "\n")


class Settings:
    model_fields = ("silent", "console", "finish_timeout", "finish_timeout_raises")

    def __init__(self, **settings):
        assert set(settings) <= set(self.model_fields)


class Run:
    starting_step = int(os.environ.get("FAKE_WANDB_STARTING_STEP", "0"))
    summary = SimpleNamespace(update=lambda values: None)

    def __init__(self, id, dir):
        self.id, self.dir = id, dir + "/wandb/run-now/files"

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, record, step):
        if FAULT == "killed service" and step == 2:
            raise ConnectionResetError("Connection lost")
        _call("log", step=step)

    def mark_preempting(self):
        _call("mark_preempting")

    def finish(self, exit_code):
        if FAULT == "hangs":
            time.sleep(1000)
        if FAULT == "slow network":
            raise TimeoutError
        _call("finish", exit_code=exit_code)


def init(**arguments):
    del arguments["settings"]
    _call("init", **arguments)
    if FAULT == "no network" and arguments["mode"] == "online":
        raise RuntimeError("could not reach the server\nand more")
    if FAULT == "dies":
        os._exit(7)
    return Run(arguments["id"], arguments["dir"])
