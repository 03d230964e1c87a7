"""The command line as a person meets it: help, a run, its text, and one sentence for each mistake."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import zeros

from grokkernels.cli import main
from grokkernels.training import checkpoint, metrics

SIZE = {"d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_dim": 32}
QUICK = [word for name, value in SIZE.items() for word in ("--set", f"{name}={value}")]
QUICK += ["--set", "num_experts=4", "--set", "top_k=2", "--context", "32", "--batch", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt and a short finished run in it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("".join(f"line {n}: the quick brown fox — über 東京\n" for n in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROKKERNELS_CACHE", str(folder / "cache"))
        result = call("train", "--data", folder / "text.txt", "--out", folder / "run", "--steps", 8, *QUICK)
        assert result.exit_code == 0, result.output
    (folder / "trained.txt").write_text(result.output)
    return folder


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in that folder."""
    monkeypatch.setenv("GROKKERNELS_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)


def call(*args: object) -> Result:
    """Run `grokkernels ARGS`; any exception but an exit is an error of the test."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("command", ["train", "generate", "compare", "plot"])
def test_help_shows_usage(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.output
    assert command in call("--help").output
    if command != "plot":
        assert "Example" in result.output
        assert "default" in result.output


def test_version_needs_no_installation() -> None:
    assert re.fullmatch(r"grokkernels, version \d+\.\d+\.\d+\n", call("--version").output)


def test_training_reports_and_leaves_its_files(folder: Path) -> None:
    said = (folder / "trained.txt").read_text()
    assert "1 document, " in said
    assert re.search(r"^8 steps in \d+:\d\d; saved ", said, re.MULTILINE)
    assert re.search(r"held-out loss \d\.\d+, unigram baseline \d\.\d+ nats per token", said)
    files = {path.name for path in (folder / "run").iterdir()}
    assert files == {".lock", "metrics.jsonl", "curves.png", "run.json", *map(checkpoint.file_name, (7, 8))}


def test_a_demo_can_require_the_baseline(tmp_path: Path) -> None:
    line = ["train", "--data", "text.txt", "--require-below-unigram", "--out", tmp_path / "run", *QUICK]
    assert call(*line, "--steps", 100, "--lr", 0.01).exit_code == 0
    poor = call(*line, "--steps", 1, "--overwrite")
    assert poor.exit_code == 1
    assert "not below the unigram baseline" in poor.output


def test_generation_streams_utf8_and_repeats_with_a_seed() -> None:
    first = call("generate", "--checkpoint", "run", "--prompt", "über ", "--max-new-tokens", 40, "--seed", 3)
    assert first.exit_code == 0, first.output
    assert first.stdout_bytes.decode("utf-8").startswith("über ")
    again = call("generate", "--checkpoint", "run", "--prompt", "über ", "--max-new-tokens", 40, "--seed", 3)
    other = call("generate", "--checkpoint", "run", "--prompt", "über ", "--max-new-tokens", 40, "--seed", 4)
    assert first.stdout_bytes == again.stdout_bytes != other.stdout_bytes
    greedy = [call("generate", "--checkpoint", "run", "--temperature", 0, "--max-new-tokens", 9) for _ in range(2)]
    assert greedy[0].stdout_bytes == greedy[1].stdout_bytes
    assert "per second" in greedy[0].stderr


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
def test_the_smallest_numbers_take_the_likeliest_token(option: str) -> None:
    likeliest = call("generate", "--checkpoint", "run", "--temperature", 0, "--max-new-tokens", 9)
    for value in (1e-300, 5e-324, 1e-40):
        result = call("generate", "--checkpoint", "run", option, value, "--max-new-tokens", 9)
        assert (result.exit_code, result.stdout_bytes) == (0, likeliest.stdout_bytes), value


def test_a_full_disk_is_named() -> None:
    with open("/dev/full", "wb") as full:
        line = [sys.executable, "-m", "grokkernels", "generate", "--checkpoint", "run", "--max-new-tokens", "3"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=120, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: No space left on device: standard output\n"


def test_a_pipe_closed_early_is_no_error() -> None:
    line = f'"{sys.executable}" -m grokkernels generate --checkpoint run --max-new-tokens 300 | head -c 1'
    done = subprocess.run(line, shell=True, capture_output=True, env=environment(), timeout=120)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def test_compare_prints_the_same_loss(folder: Path) -> None:
    result = call("compare", "--checkpoint", "run", "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "same loss" in result.output
    assert all(word in result.output for word in ("cpu", "reference", " ms", "1.00 x"))


def test_plot_draws_again(folder: Path) -> None:
    (folder / "run" / "curves.png").unlink()
    assert call("plot", "run").exit_code == 0
    assert (folder / "run" / "curves.png").stat().st_size > 10_000


def environment() -> dict[str, str]:
    """This process's, with the package that is tested on the path."""
    package = Path(sys.modules["grokkernels"].__file__ or "").parents[1]
    return {**os.environ, "PYTHONPATH": str(package)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_saves_and_resume_goes_on(folder: Path, number: signal.Signals) -> None:
    out = folder / number.name
    line = [sys.executable, "-m", "grokkernels", "train", "--data", "text.txt", "--out", out, "--steps", "100000"]
    child = subprocess.Popen([*map(str, line), *QUICK], stdout=-1, stderr=-1, text=True, env=environment())
    while not (out / metrics.FILE).exists() or not metrics.read(out / metrics.FILE):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(number)
    said, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert f"stopped by {number.name}" in said
    done = len(metrics.read(out / metrics.FILE))
    assert checkpoint.latest(out) == out / checkpoint.file_name(done)
    result = call("train", "--resume", "--out", out, "--steps", done + 2)
    assert result.exit_code == 0, result.output
    assert f"continuing after step {done}" in result.output
    assert len(metrics.read(out / metrics.FILE)) == done + 2


def test_two_trainings_do_not_share_a_folder(folder: Path) -> None:
    import fcntl

    with open(folder / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = call("train", "--resume", "--out", "run")
    assert result.exit_code == 1
    assert "another training is writing" in result.output


MISTAKES = {
    "train --data absent": "does not exist",
    "train --data empty": "no text found",
    "train --data garbage": "is not text",
    "train --data nothing": "no text found",
    "train --steps -3": "--steps",
    "train --steps 1 --minutes 1": "exclude each other",
    "train --minutes 0": "--minutes",
    "train --lr no": "--lr",
    "train --lr inf": "is not a finite number",
    "train --lr nan": "is not a finite number",
    "train --clip inf": "is not a finite number",
    "train --minutes inf": "is not a finite number",
    "train --set head_dim=512 --data text.txt": "q must have a head dim from 1 to 256, got 512",
    "train --batch 1000000000000 --data text.txt": "choose a smaller --batch or --context",
    "train --threads 100000000000": "1<=x<=1024",
    "train --device gpu": "none of auto, cpu, cuda or cuda:N",
    f"train --set x={'-' * 20_000}1 --data text.txt": "no setting 'x'",
    "train --context 100000 --data text.txt": "does not fit",
    "train --set nonsense": "NAME=VALUE",
    "train --set colour=3 --data text.txt": "no setting 'colour'",
    "train --set top_k=9 --set num_experts=2 --data text.txt": "top_k",
    "train --preset huge --data text.txt": "huge",
    "train --preset grok-1 --data text.txt": "choose a smaller --preset",
    "train --backend abacus --data text.txt": "abacus",
    "train --tokenizer text.txt": "must end in",
    "train --out text.txt": "is a file",
    "train --out run": "already holds a run",
    "train --out run --resume": "is complete",
    "train --out run --resume --overwrite": "exclude each other",
    "train --out run --resume --context 64": "contradicts",
    "train --out fresh --resume": "no checkpoint in fresh",
    "train --out text.txt/run": "Not a directory",
    "generate --checkpoint absent": "no checkpoint at absent",
    "generate --checkpoint nothing": "no checkpoint in nothing",
    "generate --checkpoint truncated": "not a complete checkpoint",
    "generate --checkpoint foreign": "not a checkpoint of",
    "generate --checkpoint text.txt": "not a complete checkpoint",
    "generate --checkpoint run --max-new-tokens -1": "--max-new-tokens",
    "generate --checkpoint run --backend abacus": "abacus",
    "generate --checkpoint run --top-p 0": "--top-p",
    "generate --checkpoint run --temperature inf": "is not a finite number",
    "generate --checkpoint run --temperature nan": "is not a finite number",
    "generate --checkpoint run --top-p nan": "is not a finite number",
    "generate --checkpoint run --threads 100000000000": "1<=x<=1024",
    "generate --checkpoint run --device cuda:x": "none of auto, cpu, cuda or cuda:N",
    "generate --checkpoint run --prompt a\udcffb": "the prompt is not UTF-8 text: character 2",
    "compare --checkpoint run --backend abacus": "abacus",
    "compare --checkpoint run --backend cpu --backend gpu": "--backend must be one of cuda, triton, cpu, emulated",
    "compare --checkpoint run --device cuda:99": "--device",
    "compare --checkpoint absent": "no checkpoint at",
    "plot nothing": "no run in",
    "fly": "No such command",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(folder: Path, tmp_path: Path, line: str) -> None:
    (folder / "empty").touch()
    (folder / "garbage").write_bytes(bytes(range(256)))
    (folder / "nothing").mkdir(exist_ok=True)
    (folder / "truncated").write_bytes((folder / "run" / checkpoint.file_name(8)).read_bytes()[:-100])
    save_file({"a": zeros(1)}, folder / "foreign")
    more = []
    if line.startswith("train"):
        more += [] if "--out" in line else ["--out", str(tmp_path)]
        more += [] if any(word in line for word in ("--steps", "--minutes", "--resume")) else ["--steps", "1"]
    result = call(*line.split(), *more)
    assert result.exit_code in (1, 2)
    assert MISTAKES[line] in result.output
    assert result.output.count("Error: ") == 1
    assert "Traceback" not in result.output
