"""Warnings about a run's health: collapse, features that no longer differ, waiting for data.

**Telling collapse from a beginning.** Let K be the number of prototypes, H the mean entropy of the teacher's targets
(nats), KL = loss - H the mean divergence of the student from its targets. Collapse means that the targets no longer
depend on the image. It has two forms, and an untrained network looks much like the first of them:

- *uniform*: every target is flat, H -> ln K, and the student has nothing left to learn, KL -> 0. An untrained network
  also has H near ln K (its logits hardly differ between images, and centering removes the part they share), and KL soon
  falls. So a flat target alone says nothing; what tells is that it stays so. Once H has been clearly below ln K (the
  run has learned), a return to it is reported after `WINDOW` steps; a run that never left is given `patience` steps
  first.
- *one prototype*: every target is the same spike, H -> 0 and KL -> 0. A sharp but healthy teacher also has a small H;
  but then images differ, the student cannot know the spike of the other view, and KL stays well above 0.

The feature spread falls with both. Alone (with H and KL unremarkable) a small spread means that the backbone gives all
images the same feature and only the head still separates them. All conditions are on means over `WINDOW` steps, so one
odd batch neither raises nor clears an alarm.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from dino_fast.cpus import usable_cpus

# The figures below come from small ViTs on 8x8 digits: a healthy run (K = 512 and 4096), one without a center, which
# falls onto one prototype, and one with a teacher temperature of 0.2, which goes flat.

# Steps over which the signals are averaged. Batches scatter H and KL by some per cent; a collapse takes tens of steps.
WINDOW = 50
# H within 2 % of ln K is flat: healthy runs passed 0.976 ln K at step 20 and had left for good at step 200, the flat
# one stayed at 0.999. A run has learned once H was below 95 % (healthy: from about step 110). The first steps, before
# the center has caught up with the logits' mean, also lie below and do not count.
FLAT, LEARNED = 0.98, 0.95
# H below 2 % of ln K: the run without a center was at 2.7 % after 50 steps and at 0.0 % after 100; healthy ones end at
# a third of ln K.
SHARP = 0.02
# KL below 0.5 % of ln K is nothing left to learn. Healthy runs never fell below 1.6 % (at steps 50 to 100, before they
# took off), both collapsed ones went through 0.3 % towards 0.06 %.
AGREED = 0.005
# Spread of the features: 0.16 to 0.22 untrained, 0.8 trained, 0.04 and falling in both collapses.
SPREAD = 0.05
# Share of a step spent waiting for data from which advice pays.
WAIT = 0.10


class Health:
    """Reads each step's metrics and warns once an episode, with the settings to change.

    `out_dim` is K. `patience` is how many steps a run may stay at flat targets before it ever learned something: at
    least the steps with a frozen last layer. `workers` and `device` shape the advice about waiting for data.
    """

    def __init__(self, out_dim: int, *, patience: int = 200, workers: int | None = None, device: str = "cpu") -> None:
        self.out_dim, self.patience, self.workers, self.device = out_dim, patience, workers, device
        self._recent: dict[str, deque[float]] = {}
        self._warned: set[str] = set()
        self._learned = False
        self._flat_steps = self._steps = 0

    def check(self, metrics: dict[str, Any]) -> list[str]:
        """Messages to show after this step, mostly none.

        Reads `teacher_entropy`, `kl` (nats), `feature_spread`, `data_wait` (a share), each where it is given;
        non-finite values are passed over.
        """
        self._steps += 1
        for name in ("teacher_entropy", "kl", "feature_spread", "data_wait"):
            value = metrics.get(name)
            if value is not None and math.isfinite(float(value)):
                self._recent.setdefault(name, deque(maxlen=WINDOW)).append(float(value))
        means = {name: sum(values) / len(values) for name, values in self._recent.items() if len(values) == WINDOW}
        findings = {**self._collapse(means), **self._narrow(means), **self._waiting(means)}
        new = [text for name, text in findings.items() if name not in self._warned]
        self._warned = set(findings)  # an episode ends when the condition no longer holds
        return new

    def _collapse(self, means: dict[str, float]) -> dict[str, str]:
        """The two forms of collapse. Nothing for K = 1, where there is only one target."""
        top = math.log(self.out_dim)
        if top == 0 or not {"teacher_entropy", "kl"} <= means.keys():
            return {}
        entropy, agreed = means["teacher_entropy"], abs(means["kl"]) < AGREED * top
        self._learned = self._learned or (self._steps > 2 * WINDOW and entropy < LEARNED * top)
        self._flat_steps = self._flat_steps + 1 if entropy > FLAT * top and agreed else 0
        if self._flat_steps and (self._learned or self._flat_steps + WINDOW - 1 > self.patience):
            return {"uniform": self._uniform(entropy, means["kl"])}
        if entropy < SHARP * top and agreed:
            return {"one prototype": self._one_prototype(entropy, means["kl"])}
        return {}

    def _uniform(self, entropy: float, kl: float) -> str:
        return (
            f"uniform collapse: every image gets the same flat target (teacher entropy {entropy:.2f} of at most "
            f"ln K = {math.log(self.out_dim):.2f}, KL {kl:.3f} over {WINDOW} steps), so nothing is being learned. Try, "
            "in this order: a lower teacher temperature (teacher_temp, warmup_teacher_temp: 0.04 or 0.03), a lower "
            "learning rate or a longer warm-up, a longer freeze of the last layer, fewer prototypes (out_dim) for a "
            "small data set. Start anew: a collapsed run does not come back"
        )

    def _one_prototype(self, entropy: float, kl: float) -> str:
        return (
            f"one-prototype collapse: every image gets the same one prototype (teacher entropy {entropy:.3f}, KL "
            f"{kl:.3f} over {WINDOW} steps), so nothing is being learned. Try, in this order: a center that "
            "follows faster (center_momentum 0.9, and check that the center is updated every step), a higher teacher "
            "temperature (teacher_temp), a lower learning rate or a longer warm-up. Start anew: a collapsed run does "
            "not come back"
        )

    def _narrow(self, means: dict[str, float]) -> dict[str, str]:
        spread = means.get("feature_spread", math.inf)
        if spread >= SPREAD:
            return {}
        return {
            "narrow": f"the backbone gives all images nearly the same feature (spread {spread:.3f} over {WINDOW} "
            "steps; 1 is as wide as can be, 0 is collapsed). If it stays so, lower the learning rate, lengthen the "
            "warm-up, and check that the images are not all alike, blank or wrongly normalized (dino-fast data preview)"
        }

    def _waiting(self, means: dict[str, float]) -> dict[str, str]:
        wait = means.get("data_wait", 0.0)
        # A second, lower bound to clear the alarm: near 10 % it would come and go.
        if wait <= (WAIT * 0.7 if "waiting" in self._warned else WAIT):
            return {}
        cores = usable_cpus()
        have = (
            f"now {self.workers}, this machine has {cores} cores" if self.workers is not None else f"{cores} cores here"
        )
        if self.workers is not None and self.workers >= cores:
            advice = (
                f"there is already a worker for each of the {cores} cores, so each image must cost less: store the "
                "images smaller (their short side a little above the global crop), fewer local crops, or a machine "
                "with more cores"
            )
        else:
            advice = f"more --workers ({have}), images stored smaller, a faster disk, or fewer local crops"
        if self.device == "cpu":
            advice += ". Training and workers share the cores here, so more workers help only up to a point"
        side = "the training side" if self.device == "cpu" else "the GPU"
        return {"waiting": f"data is the bottleneck: {side} waits {wait:.0%} of each step for crops. Try {advice}"}
