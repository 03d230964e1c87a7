"""The main job on the device: a model is trained from the command line, and speaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from gpu.device import ROOT, WORK, device_of
from gpu.record import ERROR, PASSED, Row
from gpu.worker import Question, end_with_parent

# By device: what train and generate are given.
OPTIONS = {
    "cuda": (
        ["--preset", "tiny", "--minutes", "1", "--device", "cuda", "--require-below-unigram"],
        ["--max-new-tokens", "100", "--device", "cuda"],
    ),
    "stand-in": (
        [
            *("--preset", "tiny", "--set", "num_layers=1", "--data", "CHANGELOG.md", "--steps", "1", "--batch", "1"),
            *("--context", "16", "--eval-batches", "1"),
        ],
        ["--max-new-tokens", "2"],
    ),
}


def run(*arguments: str) -> tuple[str, str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "grokkernels", *arguments], cwd=ROOT, check=False, preexec_fn=end_with_parent
    )
    if done.returncode != 0:
        return ERROR, f"ended with exit code {done.returncode}; the log has its words", {}
    return PASSED, "", {}


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    device = device_of(spec)
    out = WORK / f"train-{os.getpid()}"
    training, speaking = OPTIONS[device.name]

    def train() -> tuple[str, str, dict[str, Any]]:
        return run("train", *training, "--out", str(out))

    def speak() -> tuple[str, str, dict[str, Any]]:
        try:
            return run("generate", "--checkpoint", str(out), "--prompt", "def ", *speaking)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    yield Question(Row("train", "grok", device.name, "tiny"), train)
    yield Question(Row("generate", "grok", device.name, "tiny"), speak)
