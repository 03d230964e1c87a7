"""The training loop: one object that steps, evaluates, saves and restores, bit for bit."""

from __future__ import annotations

import json
import math
import reprlib
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint as checkpoints
from . import metrics, plot
from .checkpoint import Checkpoint
from .config import Settings
from .data import Tokens
from .device import memory_explained, to_device
from .errors import UserError
from .files import open_replacing, parse_json
from .model import check_tensors, load_weights, make_optimizer, on_backend, weights
from .progress import Silent
from .schedule import learning_rate
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..models.grok import Grok, Loss

RUN_FILE = "run.json"
_STATE = ("step", "exp_avg", "exp_avg_sq")  # the optimizer's tensors of each parameter
EVALUATIONS, SAVES = 20, 10  # per run, evenly, unless the settings count steps


@dataclass(frozen=True)
class Summary:
    """How a run ended. Times in seconds, losses in nats per token; `stopped` is the signal that ended it early."""

    steps: int
    elapsed: float
    loss: float
    held_out_loss: float | None
    unigram_loss: float
    checkpoint: Path
    picture: Path
    stopped: signal.Signals | None


class Trainer:
    """Trains `model` (float32 weights, fresh) on `tokens` into the folder `out`, on the device where the model is.

    With dtype bfloat16 the forward and backward passes run in bfloat16 on a copy of the weights, while the optimizer
    keeps and updates them in float32, since an update is often smaller than bfloat16 can add.
    """

    def __init__(
        self,
        settings: Settings,
        model: Grok,
        tokens: Tokens,
        tokenizer: Tokenizer,
        out: Path,
        show: Silent | None = None,
    ) -> None:
        tokens.check_context(settings.context)
        self.settings, self.tokens, self.tokenizer, self.out = settings, tokens, tokenizer, out
        self.show = show or Silent()
        self.device = model.embedding.device
        self.masters = weights(model)
        self.model = model if settings.dtype == "float32" else self._in_dtype(model)
        self.parameters = {name: t for name, t in self.masters.items() if t.requires_grad}
        self.optimizer = make_optimizer(self.parameters, settings)
        self.unigram = tokens.unigram_loss()
        self.step_count = 0
        self._elapsed_before = 0.0
        self._evaluating = 0.0  # seconds of this process
        self._began: float | None = None

    def _in_dtype(self, model: Grok) -> Grok:
        copy = type(model)(model.config, device="meta", dtype=getattr(torch, self.settings.dtype))
        copy.to_empty(device=self.device)
        self._copies = weights(copy)
        self._copy_weights()
        return copy

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for name, master in self.masters.items():
            self._copies[name].copy_(master)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._elapsed_before + (0.0 if self._began is None else time.perf_counter() - self._began)

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.settings.progress(self.step_count, self.elapsed)

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics record. `val_loss` is None in it."""
        s = self.settings
        began = time.perf_counter()
        rate = learning_rate(s.progress(self.step_count + 1, self.elapsed), s.lr, warmup=s.warmup, floor=s.floor)
        with memory_explained(f"--batch {s.batch} x --context {s.context} tokens do not fit, give fewer"):
            out = self.update(rate)
        # The only place where the host waits for the device. A step whose gradients are not finite changed nothing.
        figures = torch.stack([out.loss, self.optimizer.grad_norm, out.load_balance_loss, out.z_loss])
        loss, grad_norm, load_balance_loss, z_loss = figures.tolist()
        self._check_finite("the loss", loss)
        self._check_finite("the norm of the gradients", grad_norm)
        self.step_count += 1
        return {
            "step": self.step_count,
            "loss": loss,
            "val_loss": None,
            "lr": rate,
            "grad_norm": grad_norm,
            "load_balance_loss": load_balance_loss,
            "z_loss": z_loss,
            "tokens_per_s": s.batch * s.context / (time.perf_counter() - began),
            "tokens_per_expert": out.tokens_per_expert.tolist(),
        }

    def update(self, rate: float) -> Loss:
        """The work of one step at the learning rate `rate`, without reading any of its numbers from the device."""
        s = self.settings
        inputs, targets = self.tokens.batch(s.seed, self.step_count, s.batch, s.context)
        out = self.model.loss(to_device(inputs, self.device), to_device(targets, self.device))
        (out.loss + s.load_balance * out.load_balance_loss + s.z_loss * out.z_loss).backward()
        if self.model_is_copy:
            for name, parameter in self.parameters.items():
                gradient = self._copies[name].grad
                parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
                self._copies[name].grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.model_is_copy:
            self._copy_weights()
        return out

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(f"{what} became {value} at step {self.step_count + 1}: {self._advice()}")

    def _advice(self) -> str:
        """How to go on after a run has diverged."""
        lower = f"a --lr below {self.settings.lr:g}"
        last = checkpoints.latest(self.out)
        return f"start anew with {lower}" if last is None else f"go on from {last.name} with --resume and {lower}"

    @property
    def model_is_copy(self) -> bool:
        """Whether the model runs on a copy of the weights in another dtype."""
        return self.settings.dtype != "float32"

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross entropy over the held-out windows, the same ones each time."""
        s = self.settings
        total = count = 0.0
        for inputs, targets in self.tokens.held_out_batches(s.eval_batches, s.batch, s.context):
            loss = self.model.loss(to_device(inputs, self.device), to_device(targets, self.device)).loss
            total += loss.item() * targets.size
            count += targets.size
        return total / count

    def save(self) -> Path:
        """Write the checkpoint of the current step.

        Errors: UserError, with every earlier checkpoint left as it is, where a tensor holds what is no number.
        """
        tensors = {f"model/{name}": tensor for name, tensor in self.masters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
        if not all(finite):
            name = list(tensors)[finite.index(False)]
            raise UserError(
                f"{name} holds values that are not finite after step {self.step_count}, which is not saved: "
                f"{self._advice()}"
            )
        tensors["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        if self.tokenizer.source:
            tensors["tokenizer"] = torch.frombuffer(bytearray(self.tokenizer.source), dtype=torch.uint8)
        about = {
            "settings": self.settings.to_dict(),
            "config": self.model.config.to_dict(),
            "tokenizer": self.tokenizer.kind,
            "data": self.tokens.name,
            "elapsed": self.elapsed,
            "unigram_loss": self.unigram,
            "optimizer": {"groups": self._groups()},
            "torch": torch.__version__,
        }
        return checkpoints.save(self.out, self.step_count, tensors, about, self.settings.keep)

    def restore(self, saved: Checkpoint) -> None:
        """Go on exactly where `saved` was written."""
        if saved.about["data"] != self.tokens.name:
            raise UserError(
                f"the text or the tokenizer is not what {saved.path} was trained on: "
                f"give the same --data, or start a new run in another --out folder"
            )
        own = _as_saved(self.model.config.to_dict())
        there = saved.about["config"]
        if own != there:
            name = next(n for n in sorted({*own, *there}) if own.get(n) != there.get(n))
            raise UserError(
                f"{saved.path} is of another model: {name} is {reprlib.repr(there.get(name))} there and "
                f"{own.get(name)} here"
            )
        load_weights(self.masters, saved)
        if self.model_is_copy:
            self._copy_weights()
        self._restore_optimizer(saved)
        self._restore_generators(saved)
        self.step_count = saved.about["step"]
        self._elapsed_before = saved.about["elapsed"]

    def _restore_optimizer(self, saved: Checkpoint) -> None:
        """Take over the optimizer's tensors; its groups come from the settings and are only compared."""
        if _hyperparameters(saved.about["optimizer"].get("groups")) != self._groups():
            raise UserError(
                f"{saved.path} was written by an optimizer of other settings than this version makes of the run's: "
                f"resume it with the version that wrote it"
            )
        tensors = saved.part("optimizer")
        stepped = self.parameters if saved.about["step"] > 0 else {}
        shapes = {
            f"{name}/{key}": () if key == "step" else parameter.shape
            for name, parameter in stepped.items()
            for key in _STATE
        }
        check_tensors(tensors, shapes, saved)
        if not stepped:
            return
        state = self.optimizer.state_dict()
        by_identity = {id(p): name for name, p in self.parameters.items()}
        order = [by_identity[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        state["state"] = {i: {key: tensors[f"{name}/{key}"] for key in _STATE} for i, name in enumerate(order)}
        self.optimizer.load_state_dict(state)

    def _groups(self) -> list[dict[str, Any]]:
        """What the settings make of the optimizer's groups, as a checkpoint holds it."""
        return _hyperparameters(_as_saved(self.optimizer.state_dict()["param_groups"]))

    def _restore_generators(self, saved: Checkpoint) -> None:
        """Random states of the CPU and, where the run was and is on a CUDA device, of that."""
        try:
            torch.set_rng_state(saved.tensors["rng"])
            if self.device.type == "cuda" and "rng_cuda" in saved.tensors:
                torch.cuda.set_rng_state(saved.tensors["rng_cuda"], self.device)
        except (KeyError, RuntimeError, TypeError):
            raise UserError(f"{saved.path} is damaged: it holds no random state that torch can take") from None

    def run(self) -> Summary:
        """Train until the settings' length is reached or a signal asks to stop; save and draw at the end."""
        if self.progress >= 1.0:
            raise UserError(
                f"the run in {self.out} is complete ({self.step_count} steps in {self.elapsed / 60:.1f} minutes): "
                f"give more --steps or --minutes to go on"
            )
        self._describe()
        writer = metrics.MetricsWriter(self.out / metrics.FILE, self.step_count)
        if writer.dropped:
            self.show.say(f"{writer.dropped} lines of {metrics.FILE} that are no records of steps were left out")
        loss = math.nan
        held_out: float | None = None
        path: Path | None = None
        self._began = time.perf_counter()
        try:
            with on_backend(self.settings.backend), StopSignals() as stop, self.show:
                # The clock is read once per step: what is due at the end of the run is then due exactly once.
                now = self.progress
                while now < 1.0 and stop.signal is None:
                    record = self.step()
                    loss = record["loss"]
                    before, now = now, self.progress
                    if self._due(self.settings.eval_every, EVALUATIONS, before, now) and self._affordable(now):
                        held_out = record["val_loss"] = self._timed_evaluation()
                    writer.write(record)
                    self._report(record, now)
                    path = None
                    if self._due(self.settings.save_every, SAVES, before, now):
                        writer.sync()
                        path = self.save()
                if stop.signal is not None:
                    self.show.say(f"{stop.signal.name}: saving after step {self.step_count} (once more aborts)")
                writer.sync()
                path = path or self.save()
        finally:
            writer.close()
            self._elapsed_before, self._began = self.elapsed, None
        picture = self.out / plot.FILE
        draw_run(self.out)
        return Summary(self.step_count, self.elapsed, loss, held_out, self.unigram, path, picture, stop.signal)

    def _due(self, every: int | None, times: int, before: float, now: float) -> bool:
        """Whether the step just made reaches a multiple of `every` steps, or of 1 / `times` of the run, or ends it.

        `before` and `now` are the progress at the last two steps.
        """
        if now >= 1.0:
            return True
        if every is not None:
            return self.step_count % every == 0
        return math.floor(now * times) > math.floor(before * times)

    def _affordable(self, now: float) -> bool:
        """Keeps evaluations to a tenth of a timed run on a slow machine; those asked for, and the last, always are."""
        s = self.settings
        return s.steps is not None or s.eval_every is not None or now >= 1.0 or 10 * self._evaluating <= self.elapsed

    def _timed_evaluation(self) -> float:
        began = time.perf_counter()
        loss = self.evaluate()
        self._evaluating += time.perf_counter() - began
        return loss

    def _report(self, record: dict[str, Any], now: float) -> None:
        done = min(now, 1.0)
        figures = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s"
        self.show.update(done, f"step {record['step']}  {figures}")
        if record["val_loss"] is not None:
            self.show.say(
                f"step {record['step']:>6}  {100 * done:3.0f} %  {figures}  held-out loss {record['val_loss']:.3f}"
            )

    def _describe(self) -> None:
        parameters = sum(p.numel() for p in self.parameters.values())
        about = {
            "settings": self.settings.to_dict(),
            "config": self.model.config.to_dict(),
            "parameters": parameters,
            "train_tokens": len(self.tokens.train),
            "held_out_tokens": len(self.tokens.held_out),
            "unigram_loss": self.unigram,
        }
        with open_replacing(self.out / RUN_FILE, "w") as file:
            json.dump(about, file, indent=2)


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop, kept in `signal`; a second one ends the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # Nothing is printed here: the handler may have interrupted a print.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _hyperparameters(groups: Any) -> list[dict[str, Any]]:
    """Of groups, those that a step depends on, but for the learning rate, which is the schedule's at each step."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return []
    return [{key: group.get(key) for key in ("betas", "eps", "weight_decay")} for group in groups]


def _as_saved(values: Any) -> Any:
    """The values as they come back from JSON."""
    return json.loads(json.dumps(values))


def draw_run(out: Path) -> Path:
    """Draw the picture of the run in `out` from its files, finished or not."""
    try:
        text = (out / RUN_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no run in {out}: `grokkernels train --out {out}` starts one") from None
    try:
        about = parse_json(text)
        unigram, millions = float(about["unigram_loss"]), float(about["parameters"]) / 1e6
        title = f"{about['settings']['preset']}: {millions:.2f} million parameters, {out.name}"
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{out / RUN_FILE} does not describe a run: --resume writes it anew") from None
    picture = out / plot.FILE
    plot.draw(metrics.read(out / metrics.FILE), picture, unigram=unigram, title=title)
    return picture
