"""What the kill test starts: runs in forked children, killed at random moments. Arguments: tokens, out.

One process imports torch once and forks every run, so that a run starts in milliseconds. It prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from dsv3 import train
from dsv3.train import checkpoint, launch
from dsv3.train.config import TrainConfig
from tests.train.common import micro

KILLS = 50


def start(config: TrainConfig, log: Path) -> int:
    """Forks a run that resumes where the last one was killed; its output goes to `log`."""
    log.write_text("")
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout.reconfigure(line_buffering=True)
        code = 99
        try:
            code = launch.run(config, resume=True)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def finish(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main() -> None:
    torch.set_num_threads(1)
    assert train.Trainer, "everything is imported before the first fork"
    tokens, out = Path(sys.argv[1]), Path(sys.argv[2])
    settings = {"max_steps": 400, "ema_decay": 0.9, "batch": 2, "micro_batch": 2, "seq_len": 16, "lr": 2e-3}
    whole = micro(tokens, out / "whole", **settings)
    log = out / "log"
    assert finish(start(whole, log)) == 0, log.read_text()
    draw, kills, while_saving, while_deleting, resumed, rounds = random.Random(0), 0, 0, 0, 0, 0
    killed = micro(tokens, out / "killed-0", **settings, save_every=2, keep=2)
    folder = Path(killed.out)
    while True:
        expected = checkpoint.complete(folder) if folder.exists() else []
        child = start(killed, log)
        if kills < KILLS:
            time.sleep(draw.uniform(0, 0.5))
            os.kill(child, signal.SIGKILL)
        code = finish(child)
        assert code in (0, -signal.SIGKILL), log.read_text()
        text = log.read_text()
        assert "damaged" not in text, text
        if code == 0:
            # One that was killed in its last validation is resumed after its last step.
            resuming = [f"resuming {expected[0]}{end}" for end in ("\n", "; it has ended")] if expected else []
            assert any(line in text for line in resuming or ["no checkpoint in"]), text
        elif "resuming" in text:
            assert f"resuming {expected[0]}" in text, text
            resumed += 1
        for path in checkpoint.complete(folder) if folder.exists() else []:
            assert checkpoint.problem(path) is None
        kills += code != 0
        while_saving += any(folder.glob(".writing-*"))
        while_deleting += any(folder.glob(".deleting-*"))
        if code == 0 and kills >= KILLS:
            break
        if code == 0:  # a run that was done before its last kill: begin another
            rounds += 1
            killed = micro(tokens, out / f"killed-{rounds}", **settings, save_every=2, keep=2)
            folder = Path(killed.out)
    counts = {"kills": kills, "while_saving": while_saving, "while_deleting": while_deleting, "resumed": resumed}
    print(json.dumps({**counts, "rounds": rounds + 1}))


if __name__ == "__main__":
    main()
