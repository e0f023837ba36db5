"""A training process for tests: ``MODEL TASK PATHS OUT STEPS [PAUSE [PROTECT [LR]]]``, by the environment one of several.

LR ``auto``: with early stopping too.
"""

import sys
import time
from pathlib import Path

from dbes.finetuning.run import finetune
from dbes.finetuning.settings import make_settings


def main(model, task, paths, out, steps, pause="0", protect="", rate="0.01"):
    floor = float(protect) if protect else None
    found = rate == "auto"
    settings = make_settings(
        steps=int(steps), lr=rate if found else float(rate), early_stopping=found, batch_size=4, seq_len=32, weight_decay=0.1, protect=floor
    )
    # the pause gives a test the time to kill this process between two states
    finetune(
        model,
        paths,
        "task:law",
        Path(out),
        settings,
        tasks=task,
        limit=2,
        checkpoint_seconds=0,
        progress=lambda _: time.sleep(float(pause)),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
