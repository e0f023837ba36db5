"""A training process for tests: ``killed FOLDER STEPS`` or ``gloo FOLDER STEPS BALANCING``."""

import sys
from pathlib import Path

from test_testbed_training import settings
from testbed_mix import tiny_mix

from dbes.testbed.settings import RoutingSettings
from dbes.testbed.training import train


def main(kind, folder, steps, balancing="aux_loss"):
    routing = RoutingSettings(balancing=balancing, micro_batch=2 if kind == "killed" else 4)
    if kind == "killed":
        train(settings(int(steps)), tiny_mix(), folder=Path(folder), log_every=1, checkpoint_seconds=0)
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    train(settings(int(steps), routing=routing), tiny_mix(), folder=Path(folder), log_every=1, accelerator=accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
