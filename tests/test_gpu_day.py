"""The phases of `make gpu` on the stand-in for a GPU, end to end: whether they tell the truth, also of what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from grokkernels import dispatch
from grokkernels.testing import judge
from grokkernels.testing.cases import adamw as adamw_cases
from grokkernels.testing.cases import grouped_mm, tables
from tests.device import launches

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

from gpu import bridge, case_rows, conformance_rows, ncu_rows, phases, sanitizer_rows  # noqa: E402  (of tools/)
from gpu.engine import Engine, Job, Stage  # noqa: E402
from gpu.record import ABSENT, CRASHED, HUNG, KINDS, NOT_REACHED, PASSED, WRONG, Record, Row  # noqa: E402

PLANTED = {"rotary": HUNG, "moe_gate": CRASHED, "rms_norm": WRONG}
PLANT = "hang:rotary,crash:moe_gate,wrong:rms_norm"


def command(phase: str, out: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "gpu_day.py"), phase, "--device", "stand-in", "--out", str(out)]


def phase(name: str, out: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A phase from its start to its end, and the JSON that it leaves."""
    done = subprocess.run(
        command(name, out), env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert (out / f"{name}.json").exists(), done.stdout + done.stderr
    return done, json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def counts(found: dict[str, Any]) -> Counter[str]:
    return Counter(row["kind"] for row in found["rows"])


@pytest.mark.slow
def test_truth_names_what_hangs_crashes_and_is_wrong(tmp_path: Path) -> None:
    done, found = phase("truth", tmp_path, GROKKERNELS_PLANT=PLANT)
    failed = {row["op"]: row["kind"] for row in found["rows"] if row["kind"] not in (PASSED, ABSENT)}
    assert failed == PLANTED
    assert done.returncode == 1
    summary = done.stdout.splitlines()[-1]
    for op, kind in PLANTED.items():
        assert f"{op} {kind}" in summary
        assert f"| {op} | {kind} | float64 rule |" in (tmp_path / "truth.md").read_text(encoding="utf-8")
    # The rows that stood behind them were asked in new processes: every op of the library has one.
    asked = {row["op"] for row in found["rows"] if row["check"] == "float64 rule"}
    assert asked >= set(phases.ops())
    paths = {row["where"].split()[1]: row["data"]["path"] for row in found["rows"] if row["op"] == "flash_attention"}
    assert paths == {"sm_80": "sm_80", "sm_90": "sm_90"}
    assert {row["check"] for row in found["rows"]} == {"build", "conformance", "float64 rule", "tests"}


@pytest.mark.slow
def test_safety_on_the_stand_in(tmp_path: Path) -> None:
    done, found = phase("safety", tmp_path)
    assert done.returncode == 0, done.stdout
    assert set(counts(found)) == {PASSED, ABSENT}
    passed = {row["check"] for row in found["rows"] if row["kind"] == PASSED}
    streams = {"first call captured", "captured and replayed", "side stream", "bitwise repeats"}
    assert passed == {"train", "generate", *streams}
    absent = {row["check"]: row["words"] for row in found["rows"] if row["kind"] == ABSENT}
    assert absent.keys() == {"another device", *phases.TOOLS}
    assert absent["racecheck"] == "the stand-in has no GPU for it"


@pytest.mark.slow
def test_speed_on_the_stand_in(tmp_path: Path) -> None:
    done, found = phase("speed", tmp_path)
    assert done.returncode == 0, done.stdout
    timed = [row for row in found["rows"] if row["check"] == "speed" and row["data"]]
    assert {row["op"] for row in timed} >= set(phases.ops())
    for row in timed:
        assert row["data"]["seconds_ours"] > 0
        assert row["data"]["share"] > 0
        best, seconds = row["data"]["best_peer"], row["data"]["peers"]
        assert (best is None) == (not seconds)
        assert best is None or row["data"]["seconds_peer"] == min(seconds.values())
    predicted = [row for row in timed if row["op"] != "flash_attention_varlen"]
    assert all(row["data"]["seconds_predicted"] > 0 for row in predicted)
    assert {"forward", "forward + backward"} == {row["data"]["direction"] for row in timed}
    assert json.loads((tmp_path / "preference.json").read_text())["triton_first"] == []


@pytest.mark.slow
def test_a_phase_that_is_killed_leaves_what_it_knew(tmp_path: Path) -> None:
    process = subprocess.Popen(command("truth", tmp_path), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        rows: list[dict[str, Any]] = []
        while not rows:
            assert process.poll() is None
            time.sleep(0.05)
            if (tmp_path / "truth.json").exists():
                rows = json.loads((tmp_path / "truth.json").read_text(encoding="utf-8"))["rows"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = json.loads((tmp_path / "truth.json").read_text(encoding="utf-8"))["rows"]
    assert {row["check"] for row in rows} <= {row["check"] for row in left}
    assert rows[0]["check"] in (tmp_path / "truth.log").read_text(encoding="utf-8")
    assert not (tmp_path / "truth.md").exists()
    while workers_of(process.pid):  # they end with it
        time.sleep(0.05)


def workers_of(parent: int) -> list[int]:
    """Processes that the phase had started; a process keeps the group of its session, each worker has its own."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(pid) for pid, ppid, args in lines if int(ppid) == parent and "worker.py" in args]


# --- the parts ---


def test_without_a_gpu(tmp_path: Path) -> None:
    """One sentence instead of a hundred failures; what an earlier day left stays."""
    (tmp_path / "truth.json").write_text("{}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_day.py"), "truth", "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("torch finds no NVIDIA GPU or driver here")
    assert (tmp_path / "truth.json").read_text(encoding="utf-8") == "{}"


def test_a_report_names_each_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record("truth", "stand-in", tmp_path)
    for kind in KINDS:
        record.add(Row("check", f"op_{kind[:5].strip()}", "cuda", "a|b", kind, words="why\nso"))
    assert not record.finish()
    summary = capsys.readouterr().out.splitlines()[-1]
    assert "1 passed, 1 wrong, 1 error, 1 crashed, 1 hung, 1 absent, 1 not reached" in summary
    assert "op_wrong wrong (check, cuda)" in summary
    assert "op_passe" not in summary
    report = (tmp_path / "truth.md").read_text(encoding="utf-8")
    assert "| op_hung | hung | check | cuda | a\\|b | why so |" in report
    assert json.loads((tmp_path / "truth.json").read_text(encoding="utf-8"))["rows"][1]["kind"] == WRONG


def test_rows_not_reached_are_no_success(tmp_path: Path) -> None:
    record = Record("speed", "stand-in", tmp_path)
    record.add(Row("check", "op", "cuda", "", PASSED))
    assert record.finish()
    record.add(Row("check", "other", "cuda", ""))
    assert not record.finish()


def run_job(job: Job, out: Path, seconds: float) -> list[Row]:
    record = Record("truth", "stand-in", out)
    Engine(record, dict(os.environ), time.monotonic() + seconds).run([Stage("one", (job,), 1)])
    return list(record.rows.values())


def test_a_process_that_does_not_start_is_a_row(tmp_path: Path) -> None:
    (row,) = run_job(Job("a job", {"kind": "nothing", "device": "stand-in"}, 5.0), tmp_path, 600.0)
    assert (row.kind, row.op, row.check) == (CRASHED, "a job", "nothing")
    assert "ended with exit code 1" in row.words
    assert "KeyError: 'nothing'" in row.words  # the last lines that it printed


def test_what_the_budget_does_not_reach_is_said(tmp_path: Path) -> None:
    (row,) = run_job(Job("a job", {"kind": "ncu", "device": "stand-in"}, 5.0), tmp_path, 0.0)
    assert (row.kind, row.case) == (NOT_REACHED, "a job")


def test_the_judge_hands_tritons_compiled_kernels_tensors_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.triton_column, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [dispatch.home(name) for name in dispatch.BACKENDS] == ["cuda", "cuda", "cpu", "cpu", "cpu"]
    devices = []

    class Seen(Exception):
        pass

    def fence(arguments: Any, layout: str, device: str) -> None:
        devices.append(device)
        raise Seen

    monkeypatch.setattr(judge, "Fence", fence)
    table = tables()["rms_norm"]
    with pytest.raises(Seen):
        judge.judge(table, table.cases[0], torch.float32, "triton")
    assert devices == ["cuda"]


def test_adamws_cases_count_steps_where_the_parameters_are() -> None:
    table = tables()["adamw"]
    arguments = judge.on_device(judge.in_dtype(table.cases[0].arguments(), torch.float32), "meta")
    devices = []

    def step(params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, steps: Any, **options: Any) -> None:
        devices.extend(count.device.type for count in steps)

    adamw_cases._stepped(step, 3, {key: v for key, v in arguments.items() if isinstance(v, torch.Tensor)})
    assert set(devices) == {"meta"}


def test_compute_sanitizers_words() -> None:
    clean = "========= COMPUTE-SANITIZER\n1.0\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer_rows.judged(0, clean)[0] == PASSED
    found = "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 4\n=========     at kernel+0x10\n"
    kind, words, _ = sanitizer_rows.judged(99, found)
    assert (kind, words) == (WRONG, "Invalid __global__ write of size 4; at kernel+0x10")
    assert sanitizer_rows.judged(1, "no such device")[:2] == ("error", "ended with exit code 1: no such device")
    words = " ".join(sanitizer_rows.under("racecheck", "x.py"))
    assert "--tool racecheck --error-exitcode 99" in words


def test_ncus_metrics_and_clocks() -> None:
    said = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","k","GPU Speed Of Light Throughput","Duration","us","12.5"\n'
    )
    assert ncu_rows.metrics(said) == {"GPU Speed Of Light Throughput: Duration": "12.5 us"}
    assert "--clock-control none" in " ".join(ncu_rows.under("x.py", kernel="k"))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "cuda").rglob("*.cu"))
    assert all(f"{kernel}(" in sources for kernel, *_ in ncu_rows.KERNELS)


def test_hoppers_own_instructions_are_compiled_in_one_pass() -> None:
    """`-arch=sm_90a` makes a second pass that knows no setmaxnreg."""
    assert conformance_rows.gencode("90a", (9, 0)) == "-gencode=arch=compute_90a,code=sm_90a"
    assert conformance_rows.gencode("80", (9, 0)) == "-gencode=arch=compute_90,code=sm_90"


def test_the_path_of_a_case() -> None:
    hopper, plain = "void grokkernels::f_sm90_kernel<float>(P)", "void grokkernels::f_kernel<float>(P)"
    assert case_rows.path(Counter([hopper, plain]), None) == "sm_90"
    assert case_rows.path(Counter([plain]), "strides") == "sm_80, refused map: strides"
    assert case_rows.path(Counter(), None) == ""
    assert case_rows.short(hopper) == "f_sm90_kernel"


def test_a_refused_map_is_told() -> None:
    """Rows of 33 numbers in bfloat16: no stride is a multiple of 16 bytes."""
    with judge.at_level("sm_90"), launches.watched("emulated", runs=True) as threads:
        case_rows.refusal_of("emulated")
        verdict = judge.judge(grouped_mm.TABLE, grouped_mm.case((9, 7), 33, 65), torch.bfloat16, "emulated")
    assert verdict.passed
    assert case_rows.path(threads, case_rows.refusal_of("emulated")).startswith("sm_80, refused map: the tensor's")
    assert case_rows.refusal_of("emulated") is None


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: x[1:, ::2], lambda x: x.mT, lambda x: x[:0], lambda x: x[0, 0]]
)
def test_the_bridge_keeps_strides_and_alignment(make: Any) -> None:
    tensor = make(torch.randn(7, 9))
    copy = bridge.moved(tensor, "cpu")
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert tensor.numel() == 0 or copy.data_ptr() % 16 == tensor.data_ptr() % 16
    assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_the_bridge_brings_back_what_was_written() -> None:
    schema = torch.ops.grokkernels.rotary_inplace.native._schema
    q, other = torch.zeros(2, 3), torch.zeros(2, 3)

    def function(*args: Any) -> None:
        args[0].add_(1)
        args[2].add_(1)

    assert bridge.across(function, schema, "cpu")(q, None, other) is None
    assert torch.equal(q, torch.ones(2, 3))
    assert torch.equal(other, torch.zeros(2, 3))
