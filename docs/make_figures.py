"""Draws the figures of mathematics.md: `python docs/make_figures.py` writes docs/figures/*.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9741a", "#2b8a5b", "#e4e6ea"


def pairs(local: int = 4) -> None:
    """Which pairs of views count, and the weight and target that each of the student's rows ends up with."""
    views = 2 + local
    figure, axes = plt.subplots(figsize=(7.6, 2.5))
    for u in range(2):
        for v in range(views):
            colour = GREY if u == v else BLUE if v < 2 else ORANGE
            axes.add_patch(plt.Rectangle((v, 1 - u), 0.94, 0.94, color=colour))
            text = "same" if u == v else "1"
            axes.text(v + 0.47, 1.47 - u, text, ha="center", va="center", color="#555" if u == v else "white", size=8)
    for v in range(views):
        name = f"global {v}" if v < 2 else f"local {v - 2}"
        axes.text(v + 0.47, 2.15, name, ha="center", size=9)
        target = f"P({1 - v})" if v < 2 else "P(0) + P(1)"
        axes.text(v + 0.47, -0.3, f"w = {1 if v < 2 else 2}", ha="center", size=9, weight="bold")
        axes.text(v + 0.47, -0.62, target, ha="center", size=9)
    for u in range(2):
        axes.text(-0.12, 1.47 - u, f"teacher's view {u}", ha="right", va="center", size=9)
    axes.text(-0.12, -0.3, "weight", ha="right", size=9)
    axes.text(-0.12, -0.62, "target q", ha="right", size=9)
    axes.text(views / 2, 2.5, "student's views", ha="center", size=9, style="italic")
    axes.set(xlim=(-1.9, views), ylim=(-0.8, 2.75))
    axes.axis("off")
    save(figure, "pairs")


def targets_and_teacher() -> None:
    """Left: one row of logits at three temperatures. Right: how much each earlier student weighs in the teacher."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.6))
    logits = np.sort(np.random.default_rng(0).normal(0, 0.15, 4096))[::-1]
    for temperature, colour in ((0.1, BLUE), (0.07, GREEN), (0.04, ORANGE)):
        p = np.exp((logits - logits.max()) / temperature)
        p /= p.sum()
        label = f"{temperature}: entropy {-(p * np.log(p)).sum():.2f} nats"
        left.plot(np.arange(1, 4097), np.cumsum(p), color=colour, label=label)
    left.set(xscale="log", xlabel="likeliest prototypes (of 4,096)", ylabel="share of the probability", ylim=(0, 1))
    left.set_title("A target sharpens with its temperature", size=10)
    steps = np.arange(0, 2000)
    for momentum, colour in ((0.99, BLUE), (0.996, GREEN), (0.999, ORANGE)):
        kept = 1 - momentum ** (steps + 1)
        right.plot(
            steps, kept, color=colour, label=f"{momentum}: half within {np.log(0.5) / np.log(momentum):.0f} steps"
        )
    right.set(xlabel="steps back", ylabel="share of the teacher", ylim=(0, 1), xlim=(0, 2000))
    right.set_title("The teacher is made of recent students", size=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.tight_layout()
    save(figure, "targets-and-teacher")


def save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=160, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    pairs()
    targets_and_teacher()
