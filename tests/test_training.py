"""Training: text to tokens, the schedule, a loss that falls, and a resume that repeats every bit."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grokkernels.training import checkpoint, data, metrics, plot, tokenizer
from grokkernels.training.errors import UserError
from grokkernels.training.generate import stream
from grokkernels.training.model import restore
from grokkernels.training.progress import Silent, duration
from grokkernels.training.run import train
from grokkernels.training.schedule import learning_rate
from grokkernels.training.trainer import StopSignals, Summary

SMALL = {
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "ffn_dim": 32,
    "num_experts": 4,
    "top_k": 2,
}
TEXT = "".join(f"line {n}: the quick brown fox jumps over the lazy dog\n" for n in range(400))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test prepares its own tokens."""
    monkeypatch.setenv("GROKKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """One text file."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def settings_for(text: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of a second."""
    values: dict[str, Any] = {"data": (str(text),), "overrides": SMALL, "context": 32, "batch": 2, "steps": 6}
    return {**values, "threads": 1, "eval_batches": 2, **changes}


# Schedule, durations


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(p / 100, 2.0, warmup=0.1, floor=0.25) for p in range(101)]
    assert rates[0] == 0.0
    assert rates[10] == 2.0
    assert rates[100] == pytest.approx(0.5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0.0, 2.0, warmup=0.0) == 2.0
    assert learning_rate(1.7, 2.0, floor=0.1) == pytest.approx(0.2)


def test_durations_read_as_a_clock() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "1:00:00"]


# Tokenizers


def test_bytes_come_back_and_characters_stay_whole() -> None:
    words = tokenizer.ByteTokenizer()
    said = "naïve → 東京 🦊"
    decoder = words.decoder()
    pieces = [decoder.feed(int(i)) for i in words.encode(said)]
    assert "".join(pieces) + decoder.finish() == said
    assert all("\ufffd" not in piece for piece in pieces)
    assert "" in pieces  # an unfinished character waits


def test_invalid_and_unfinished_bytes_become_a_replacement_character() -> None:
    decoder = tokenizer.ByteDecoder()
    assert decoder.feed(0xFF) == "\ufffd"
    assert decoder.feed(0xE6) == ""
    assert decoder.finish() == "\ufffd"


def test_pieces_stream_as_the_whole_would_decode() -> None:
    vocabulary = [b"\xe6", b"\x9d\xb1", b" a", b"b", b" "]

    def decode(ids: list[int]) -> str:
        return b"".join(vocabulary[i] for i in ids).decode("utf-8", "replace").removeprefix(" ")

    ids = [2, 3, 2, 0, 1, 4, 4, 3, 0]
    decoder = tokenizer.PieceDecoder(decode)
    assert "".join([*(decoder.feed(i) for i in ids), decoder.finish()]) == decode(ids)


@pytest.mark.parametrize(("ending", "package"), [(".model", "sentencepiece"), (".json", "tokenizers")])
def test_a_missing_tokenizer_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    path = tmp_path / f"words{ending}"
    path.touch()
    with pytest.raises(UserError, match=f"pip install {package}"):
        tokenizer.load(str(path))


def test_a_tokenizers_file_trains_and_speaks(tmp_path: Path, text: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"])
    made.train_from_iterator([TEXT], trainer)
    path = tmp_path / "words.json"
    made.save(str(path))
    check_tokenizer_file(path, text, tmp_path)


def test_a_sentencepiece_file_trains_and_speaks(tmp_path: Path, text: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = str(tmp_path / "words")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=prefix, vocab_size=320, byte_fallback=True, minloglevel=2, hard_vocab_limit=False
    )
    check_tokenizer_file(Path(prefix + ".model"), text, tmp_path)


def check_tokenizer_file(path: Path, text: Path, folder: Path) -> None:
    """Ids decode to the text, a run trains, and its checkpoint speaks when the file is gone."""
    words = tokenizer.load(str(path))
    said = "the lazy dog → 🦊 fox"
    decoder = words.decoder()
    assert "".join([*(decoder.feed(int(i)) for i in words.encode(said)), decoder.finish()]) == said
    summary = train(folder / "out", settings_for(text, tokenizer=str(path), steps=2))
    path.unlink()
    model, again = restore(checkpoint.load(summary.checkpoint))
    assert again.vocab_size == words.vocab_size == model.config.vocab_size
    assert isinstance("".join(stream(model, again, "the", max_new_tokens=5, seed=0)), str)


@pytest.mark.parametrize(("name", "package"), [("w.model", "sentencepiece"), ("w.json", "tokenizers")])
def test_a_broken_tokenizer_file_says_so(tmp_path: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    (tmp_path / name).write_bytes(b"\x01garbage")
    with pytest.raises(UserError, match=name):
        tokenizer.load(str(tmp_path / name))


# Data


def test_one_file_holds_its_end_out(text: Path) -> None:
    tokens = data.prepare([str(text)], tokenizer.ByteTokenizer())
    train_part, held_out = bytes(tokens.train), bytes(tokens.held_out)
    assert (train_part[:-1] + held_out[:-1]).decode() == TEXT
    assert train_part[-1] == held_out[-1] == 0
    assert train_part[:-1].endswith(b"\n")
    assert 0.03 < len(held_out) / len(TEXT) < 0.06


def test_many_files_hold_whole_ones_out(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(100):
        (folder / f"{n}.txt").write_text(f"document {n:03d} " * 10)
    (folder / "again.txt").write_text("document 007 " * 10)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_text("secret")
    tokens = data.prepare([str(folder)], tokenizer.ByteTokenizer())
    parts = [bytes(part).split(b"\0")[:-1] for part in (tokens.train, tokens.held_out)]
    assert tokens.documents == 100  # the second copy of 007 counts once
    assert tokens.skipped == 1
    assert len(parts[1]) == 5
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(f"document {n:03d} ".encode() * 10 for n in range(100))


def test_the_cache_is_reused_and_follows_the_content(text: Path, own_cache: Path) -> None:
    first = data.prepare([str(text)], tokenizer.ByteTokenizer())
    written = first.path.stat().st_mtime_ns
    moved = text.rename(text.with_name("moved.txt"))
    again = data.prepare([str(moved)], tokenizer.ByteTokenizer())
    assert (again.path, again.path.stat().st_mtime_ns) == (first.path, written)
    moved.write_text(TEXT + "more\n")
    other = data.prepare([str(moved)], tokenizer.ByteTokenizer())
    assert other.name != first.name
    assert len(list(own_cache.iterdir())) == 2


def test_a_damaged_cache_says_so(text: Path) -> None:
    path = data.prepare([str(text)], tokenizer.ByteTokenizer()).path
    for content in (path.read_bytes()[:-1], b"", b"\0" * 5000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            data.prepare([str(text)], tokenizer.ByteTokenizer())


def test_batches_depend_on_seed_and_step_alone(text: Path) -> None:
    tokens = data.prepare([str(text)], tokenizer.ByteTokenizer())
    inputs, targets = tokens.batch(7, 3, 4, 16)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == np.int64
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(tokens.batch(7, 3, 4, 16)[0], inputs)
    assert not np.array_equal(tokens.batch(7, 4, 4, 16)[0], inputs)
    assert not np.array_equal(tokens.batch(8, 3, 4, 16)[0], inputs)


def test_windows_reach_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_text("abcdefghij" * 20)
    tokens = data.prepare([str(path)], tokenizer.ByteTokenizer())
    context = len(tokens.train) - 2
    starts = {int(tokens.batch(0, step, 1, context)[0][0, 0]) for step in range(40)}
    assert starts == {int(tokens.train[0]), int(tokens.train[1])}
    windows = list(tokens.held_out_batches(100, 2, len(tokens.held_out) - 1))
    assert [w[0].shape[0] for w in windows] == [1]
    tokens.check_context(len(tokens.held_out) - 1)
    with pytest.raises(UserError, match="held-out text of"):
        tokens.check_context(len(tokens.held_out))


def test_the_unigram_loss_is_the_counted_one(text: Path) -> None:
    tokens = data.prepare([str(text)], tokenizer.ByteTokenizer())
    counts = np.bincount(tokens.train, minlength=256) + 1
    by_hand = -np.mean([math.log(counts[i] / counts.sum()) for i in tokens.held_out])
    assert tokens.unigram_loss() == pytest.approx(by_hand, rel=1e-12)


def test_the_standard_library_is_text_enough() -> None:
    tokens = data.prepare([], tokenizer.ByteTokenizer())
    assert tokens.documents > 100
    assert len(tokens.train) > 1_000_000
    assert 0.04 < len(tokens.held_out) / len(tokens.train) < 0.06


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "no text found"), (b"abc\0def", "zero byte at offset 3"), (b"abc\xff", "byte 0xff at offset 3")],
)
def test_files_that_are_no_text_say_so(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        data.prepare([str(path)], tokenizer.ByteTokenizer())


# Metrics and picture


def test_metrics_drop_later_steps_and_half_lines(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    writer = metrics.MetricsWriter(path)
    for step in (1, 2, 3):
        writer.write(a_record(step, loss=float("inf") if step == 1 else 1.0))
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 3]
    assert metrics.read(path)[0]["loss"] is None
    writer = metrics.MetricsWriter(path, step=2)
    writer.write(a_record(3))
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def a_record(step: int, **changes: Any) -> dict[str, Any]:
    """What a step writes to the metrics."""
    numbers = ("loss", "lr", "grad_norm", "load_balance_loss", "z_loss", "tokens_per_s")
    record = {"step": step, "val_loss": None, "tokens_per_expert": [[1, 0], [0, 0]], **dict.fromkeys(numbers, 1.5)}
    return {**record, **changes}


def test_lines_that_are_no_records_are_left_out_and_counted(tmp_path: Path) -> None:
    """Whatever a line holds, what is read can be drawn and written again."""
    good = a_record(1)
    values = [None, True, "x", -1.5, 10**400, math.nan, math.inf, [], {}, [[1], [2, 3]], [[1], [None]], [[math.nan]]]
    lines = [json.dumps({**good, key: value}) for key in good for value in [*values, [[1.0]]]]
    lines += [json.dumps({k: v for k, v in good.items() if k != key}) for key in good]
    lines += ["", "null", "7", "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\x00\xff"]
    path = tmp_path / metrics.FILE
    path.write_text("\n".join([json.dumps(good), *lines, json.dumps(a_record(2))]) + "\n")
    writer = metrics.MetricsWriter(path, step=10**500)
    writer.close()
    kept = metrics.read(path)
    assert [kept[0], kept[-1]] == [good, a_record(2)]
    assert writer.dropped == 2 + len(lines) - len(kept) > 100
    assert all(np.shape(record["tokens_per_expert"]) == (2, 2) for record in kept)
    plot.draw(kept, tmp_path / plot.FILE)


def test_a_picture_is_drawn_from_one_step_on(tmp_path: Path) -> None:
    path = tmp_path / plot.FILE
    plot.draw([a_record(1)], path, unigram=3.0, title="a folder of no text: \udcff $x^")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="nothing to draw"):
        plot.draw([], path)


# Training


class StopAfter(Silent):
    """Sends this process a signal once `step` steps are done."""

    def __init__(self, steps: int, number: signal.Signals = signal.SIGINT) -> None:
        self.left, self.number = steps, number

    def update(self, progress: float, text: str) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)


def everything(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A checkpoint's tensors, and its description without what the clock wrote."""
    saved = checkpoint.load(path)
    return saved.tensors, {k: v for k, v in saved.about.items() if k not in ("elapsed", "settings", "crc32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_repeats_every_bit(tmp_path: Path, text: Path, dtype: str) -> None:
    """Six steps at once, and three steps, an interruption and three more: the same numbers everywhere."""
    given = settings_for(text, dtype=dtype)
    straight = train(tmp_path / "a", given)
    stopped = train(tmp_path / "b", given, show=StopAfter(3))
    assert (stopped.steps, stopped.stopped) == (3, signal.SIGINT)
    torch.manual_seed(123)  # what happened in between must not matter
    resumed = train(tmp_path / "b", {}, resume=True)
    assert (resumed.steps, resumed.stopped) == (6, None)

    tensors, about = everything(straight.checkpoint)
    tensors_again, about_again = everything(resumed.checkpoint)
    assert tensors.keys() == tensors_again.keys()
    assert sum(name.startswith("optimizer/") for name in tensors) >= 2
    for name, tensor in tensors.items():
        assert torch.equal(tensor, tensors_again[name]), name
    assert about == about_again
    records, records_again = (metrics.read(tmp_path / run / metrics.FILE) for run in "ab")
    assert [r["step"] for r in records_again] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(records, records_again, strict=True):
        assert {**one, "tokens_per_s": 0} == {**other, "tokens_per_s": 0}


def test_the_loss_falls_below_the_unigram_baseline(tmp_path: Path, text: Path) -> None:
    summary = train(tmp_path / "out", settings_for(text, steps=100, batch=8, lr=0.01))
    assert isinstance(summary, Summary)
    assert summary.held_out_loss is not None
    assert summary.held_out_loss < summary.unigram_loss - 0.5
    records = metrics.read(tmp_path / "out" / metrics.FILE)
    assert len(records) == 100
    assert sum(r["val_loss"] is not None for r in records) == 20
    assert len(list((tmp_path / "out").glob("step-*.safetensors"))) == 2
    layers = np.array(records[-1]["tokens_per_expert"])
    assert layers.shape == (2, 4)
    assert set(records[-1]) == {
        "step", "loss", "val_loss", "lr", "grad_norm", "load_balance_loss", "z_loss", "tokens_per_s",
        "tokens_per_expert",
    }  # fmt: skip
    assert (tmp_path / "out" / plot.FILE).exists()


def test_a_time_budget_ends_the_run(tmp_path: Path, text: Path) -> None:
    summary = train(tmp_path / "out", settings_for(text, steps=None, minutes=0.01))
    assert 0.6 <= summary.elapsed < 10
    records = metrics.read(tmp_path / "out" / metrics.FILE)
    assert records[-1]["lr"] < max(r["lr"] for r in records)
    with pytest.raises(UserError, match="is complete"):
        train(tmp_path / "out", {}, resume=True)
    longer = train(tmp_path / "out", {"minutes": 2 * summary.elapsed / 60}, resume=True)
    assert longer.steps > summary.steps


def test_vectors_do_not_decay(tmp_path: Path, text: Path) -> None:
    summary = train(tmp_path / "out", settings_for(text, steps=1))
    saved = checkpoint.load(summary.checkpoint)
    groups = saved.about["optimizer"]["groups"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_a_stop_signal_is_taken_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_diverging_run_stops_with_advice(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UserError, match="start anew with a --lr below"):
        train(tmp_path / "out", settings_for(text, steps=200, lr=1e30, clip=1e30, warmup=0.0))


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, text: Path) -> None:
    """A learning rate beyond float32 makes every weight infinite in one step, with a finite loss and gradients."""
    out = tmp_path / "out"
    given = settings_for(text, steps=40, lr=1e39, save_every=1, keep=1)
    with pytest.raises(UserError, match=r"not finite after step 1, which is not saved: start anew with a --lr below"):
        train(out, given)
    assert checkpoint.latest(out) is None

    good = train(out, {**given, "lr": 1e-3, "steps": 2}).checkpoint
    content = good.read_bytes()
    with pytest.raises(UserError, match=rf"go on from {good.name} with --resume and a --lr below 1e\+39"):
        train(out, {"lr": 1e39, "steps": 4}, resume=True)
    assert [path.read_bytes() for path in out.glob("step-*")] == [content]
    assert train(out, {"lr": 1e-3, "steps": 4}, resume=True).steps == 4


def test_a_model_of_more_ids_than_bytes_speaks(tmp_path: Path, text: Path) -> None:
    summary = train(tmp_path / "out", settings_for(text, overrides={**SMALL, "vocab_size": 5000}, steps=1))
    model, words = restore(checkpoint.load(summary.checkpoint))
    assert "\ufffd" in "".join(stream(model, words, "a", max_new_tokens=9, temperature=9.0, seed=0))


@pytest.mark.parametrize(
    ("vocabulary", "unknown", "reason"),
    [
        ({"[UNK]": 0, "line": 2**32 - 1}, "[UNK]", r"4,294,967,297 ids, .* at most 2\^31"),
        ({"line": 0}, "[UNK]", "cannot encode the text"),
    ],
)
def test_a_vocabulary_that_does_not_do_says_so(
    tmp_path: Path, text: Path, vocabulary: dict[str, int], unknown: str, reason: str
) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "words.json"
    made = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown}}
    made |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    path.write_text(json.dumps({**made, "added_tokens": []}))
    with pytest.raises(UserError, match=reason):
        train(tmp_path / "out", settings_for(text, tokenizer=str(path)))


def test_an_empty_sentencepiece_file_says_so(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    path = tmp_path / "words.model"
    path.touch()
    with pytest.raises(UserError, match="is empty"):
        tokenizer.load(str(path))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"context": 16}, "--context 32, which --context 16 contradicts"),
        ({"overrides": {}}, "--overrides"),
        ({"beta1": 0.5}, "--beta1 0.9, which --beta1 0.5 contradicts"),
        ({"steps": 3}, "is complete"),
    ],
)
def test_resume_refuses_what_would_change_the_run(
    tmp_path: Path, text: Path, changed: dict[str, Any], reason: str
) -> None:
    train(tmp_path / "out", settings_for(text, steps=3))
    with pytest.raises(UserError, match=reason):
        train(tmp_path / "out", changed, resume=True)


def test_resume_refuses_other_text_and_another_model(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    summary = train(out, settings_for(text, steps=3))
    saved = checkpoint.load(summary.checkpoint)
    text.write_text(TEXT + "changed\n")
    with pytest.raises(UserError, match=r"not what .* was trained on"):
        train(out, {"steps": 6}, resume=True)
    text.write_text(TEXT)
    saved.about["settings"]["overrides"] = {**SMALL, "d_model": 64}
    checkpoint.save(out, 3, saved.tensors, saved.about)
    with pytest.raises(UserError, match="d_model is 32 there and 64 here"):
        train(out, {"steps": 6}, resume=True)
    saved.about["settings"]["overrides"] = SMALL
    del saved.tensors["rng"]
    weight = next(name for name in saved.tensors if name.startswith("model/"))
    checkpoint.save(out, 3, {**saved.tensors, weight: torch.zeros(1)}, saved.about)
    with pytest.raises(UserError, match="belongs to another model"):
        train(out, {"steps": 6}, resume=True)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"no checkpoint in .* to resume"):
        train(out, {}, resume=True)
    train(out, settings_for(text, steps=3))
    with pytest.raises(UserError, match="already holds a run"):
        train(out, settings_for(text, steps=2))
    assert train(out, settings_for(text, steps=2), overwrite=True).steps == 2
    assert sorted(p.name for p in out.glob("step-*")) == [checkpoint.file_name(1), checkpoint.file_name(2)]
    assert len(metrics.read(out / metrics.FILE)) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch": 10**12}, r"a step of 1,000,000,000,000 x 32 tokens needs at least"),
        ({"batch": 10**30}, r"batch must be an integer, at least 1 and below 2\^63, got 1000"),
        (
            {"overrides": {**SMALL, "head_dim": 512}},
            "this model cannot run: q must have a head dim from 1 to 256, got 512",
        ),
        ({"overrides": {**SMALL, "max_position": 10**13}}, "needs 1,192,093 GiB of memory"),
        ({"overrides": {**SMALL, "num_layers": 10**6}}, "needs .* GiB of memory"),
        ({"overrides": {**SMALL, "d_model": 10**400}}, "below 2.63"),
        ({"overrides": {**SMALL, "norm_eps": 10**400}}, "norm_eps must be finite"),
        ({"threads": 10**11}, "threads must be an integer, at least 1 and at most 1024"),
        ({"lr": math.inf}, "lr must be a finite number, above 0, got inf"),
        ({"clip": math.nan}, "clip must be a finite number, above 0, got nan"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"steps": -1}, r"steps must be an integer, at least 1 and below 2\^63, got -1"),
        ({"minutes": 1.0}, "steps or as minutes"),
        ({"batch": 0}, r"batch must be an integer, at least 1 and below 2\^63, got 0"),
        ({"dtype": "int8"}, "float32 or bfloat16"),
        ({"context": 100_000}, "does not fit into the training text"),
        ({"preset": "huge"}, "huge"),
        ({"overrides": {"width": 3}}, "no setting 'width'"),
        ({"overrides": {**SMALL, "vocab_size": 100}}, "below the tokenizer's 256"),
        ({"backend": "abacus"}, "'abacus'"),
        ({"backend": "cuda"}, "'cuda'"),
        ({"data": ("/no/such/file",)}, "does not exist"),
        ({"data": ("/dev/null",)}, "neither a file nor a folder"),
        ({"tokenizer": "words.txt"}, "must end in"),
        ({"tokenizer": "absent.model"}, "cannot read the tokenizer"),
        ({"colour": "red"}, "unknown training settings"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, text: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        train(tmp_path / "out", settings_for(text, **changes))


# Generation


class Scripted:
    """A model that says a fixed text, and remembers what it was asked."""

    class config:
        max_position = 8

    def __init__(self, script: list[int]) -> None:
        self.script, self.prompts = script, []

    def generate(self, prompt: torch.Tensor, count: int, **options: Any) -> Iterator[int]:
        assert prompt.dtype == torch.int64
        assert prompt.shape[1] + count <= self.config.max_position
        self.prompts.append((bytes(prompt[0].tolist()), options["seed"]))
        for _ in range(count):
            yield self.script.pop(0)


def said(model: Scripted, prompt: str, **options: Any) -> str:
    """The whole of a stream."""
    return "".join(stream(model, tokenizer.ByteTokenizer(), prompt, **options))  # type: ignore[arg-type]


def test_generation_ends_at_the_limit_and_at_the_separator() -> None:
    model = Scripted([*"né".encode(), 0, 65])
    assert said(model, "ab", max_new_tokens=6) == "né"
    assert model.prompts == [(b"ab", None)]
    model = Scripted([*"né".encode()])
    assert said(model, "", max_new_tokens=2) == "n\ufffd"
    assert model.prompts == [(b"\0", None)]


def test_a_long_text_goes_on_from_its_last_half_window() -> None:
    model = Scripted([*b"efghijklm"])
    assert said(model, "abcd", max_new_tokens=9, seed=5) == "efghijklm"
    assert model.prompts == [(b"abcd", 5), (b"efgh", 6), (b"ijkl", 7)]
    model = Scripted([*b"xy"])
    assert said(model, "abcdefghijkl", max_new_tokens=2, window=4) == "xy"
    assert model.prompts == [(b"kl", None)]
