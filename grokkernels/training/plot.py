"""The picture of a run: losses against the unigram baseline, speed, and which experts the tokens went to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .files import replacing

FILE = "curves.png"


def draw(records: Sequence[dict[str, Any]], path: Path, *, unigram: float | None = None, title: str = "") -> None:
    """Write the picture of a run's metrics records to `path` (PNG)."""
    if not records:
        raise UserError(f"there is nothing to draw in {path.parent}: the run has no metrics yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.array([r["step"] for r in records])
    figure, ((losses, speed), (experts, layers)) = pyplot.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    printable = title.encode("utf-8", "replace").decode()  # a folder's name may be no text at all
    figure.suptitle(printable, parse_math=False)

    train = _column(records, "loss")
    losses.plot(steps, train, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    losses.plot(steps, _smooth(train), color="tab:blue", label="training, smoothed")
    checked = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if checked:
        losses.plot(*zip(*checked, strict=True), "o-", color="tab:orange", markersize=4, label="held-out")
    if unigram is not None:
        losses.axhline(unigram, color="black", linestyle="--", linewidth=1, label=f"unigram baseline {unigram:.2f}")
    losses.set(title="Loss", xlabel="step", ylabel="cross entropy (nats per token)")
    losses.legend()

    rate = _column(records, "tokens_per_s")
    speed.plot(steps, rate, color="tab:green", alpha=0.25, linewidth=0.8, label="each step")
    speed.plot(steps, _smooth(rate), color="tab:green", label="smoothed")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.legend(loc="best")
    speed.set(title="Speed", xlabel="step", ylabel="tokens per second")
    speed.set_ylim(0, 1.2 * float(np.nanpercentile(rate, 98)))

    counts = np.array([r["tokens_per_expert"] for r in records], dtype=float)  # (steps, layers, experts)
    shares = 100.0 * counts / np.maximum(counts.sum(-1, keepdims=True), 1.0)
    number = shares.shape[-1]
    mean = shares.mean(1)
    colours = pyplot.get_cmap("tab10" if number <= 10 else "tab20")
    for expert in range(number):
        experts.plot(steps, _smooth(mean[:, expert]), label=f"expert {expert}", color=colours(expert % 20))
    experts.axhline(100.0 / number, color="black", linestyle="--", linewidth=1, label="even share")
    experts.set(title="Tokens per expert, mean over the layers, smoothed", xlabel="step", ylabel="share of tokens (%)")
    experts.set_ylim(0, 1.35 * float(mean.max()))  # the head room is the legend's
    if number <= 16:
        experts.legend(ncols=5, fontsize="small", loc="upper center")

    last = shares[-max(1, len(shares) // 10) :].mean(0)
    image = layers.imshow(last, aspect="auto", cmap="viridis", vmin=0)
    layers.set(title="Tokens per expert in the last tenth of the run", xlabel="expert", ylabel="layer")
    layers.set_xticks(_ticks(number))
    layers.set_yticks(_ticks(len(last)))
    if last.size <= 128:
        for (layer, expert), share in np.ndenumerate(last):
            dark = share < 0.6 * last.max()
            layers.text(expert, layer, f"{share:.0f}", ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, ax=layers, label="share of tokens (%)")

    for axes in (losses, speed, experts):
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _column(records: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if r.get(name) is None else r[name] for r in records], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a fiftieth of the run, corrected for its start; gaps are skipped."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 50)
    out = np.empty_like(values)
    total = weight = 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1.0
        out[i] = total / weight if weight else np.nan
    return out


def _ticks(number: int) -> range:
    return range(0, number, max(1, number // 16))
