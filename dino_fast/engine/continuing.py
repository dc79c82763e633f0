"""Checkpoints of a run: how it is saved, and how it goes on from one."""

from __future__ import annotations

import time
import warnings

from dino_fast.engine import checkpoint
from dino_fast.engine import distributed as many
from dino_fast.engine.config import to_dict
from dino_fast.engine.findings import settle
from dino_fast.engine.job import Job
from dino_fast.engine.monitor import Progress
from dino_fast.engine.train_step import learner_state, restore_learner
from dino_fast.errors import UserError


def resume(job: Job) -> bool:
    """Puts the job where its last whole checkpoint is. False where the run was already finished."""
    if not job.config.resume:
        return True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = many.told(job.ranks, checkpoint.load(job.run.checkpoints) if job.ranks.first else None)
    for warning in caught:
        job.say(f"note: {warning.message}")
    if loaded is None:
        if job.learner.config != job.config:
            raise UserError(
                f"no checkpoint of {job.run.path} is whole, and it began from {job.config.init_from}; start a new run "
                "with another --out"
            )
        job.run.cut_back(-1)
        job.say(f"{job.run.path} has no whole checkpoint yet: starting over")
        return True
    job.step, state = loaded
    if state["images"] != len(job.data.train):
        raise UserError(
            f"the run in {job.run.path} trains on {state['images']} images, and {job.config.data} has "
            f"{len(job.data.train)}; give the same images with --data, or start a new run with another --out"
        )
    restore_learner(job.learner, state, str(job.run.path))
    job.best, job.saved = state["best"], job.step
    if job.step >= job.end:
        job.say(f"the run in {job.run.path} is finished: {job.step} steps of {job.end}")
        return False
    job.run.cut_back(job.step - 1)
    job.progress = Progress(job.end, start=job.step, device=str(job.learner.device), enabled=job.ranks.first)
    job.say(f"continuing at step {job.step} of {job.end}")
    return True


def save(job: Job, measured: dict[str, float]) -> None:
    """A checkpoint, and the best one where the k-NN accuracy is the highest so far. No step that nobody has looked at
    is in it."""
    settle(job)
    is_best = measured.get("knn", -1.0) > job.best
    job.best = max(job.best, measured.get("knn", -1.0))
    state = {
        **learner_state(job.learner),
        "config": to_dict(job.config),
        "images": len(job.data.train),
        "num_heads": getattr(job.learner.teacher.backbone, "num_heads", None),
        "best": job.best,
    }
    job.saved, job.saved_at = job.step, time.monotonic()
    if job.ranks.world > 1 or job.writer.background:  # copies: the next step changes the weights
        state = many.gathered(state, keep=job.ranks.first)
    if job.ranks.first:
        job.writer.save(job.run.checkpoints, job.step, state, job.config.keep, is_best)


def how_to_resume(job: Job) -> str:
    return f"Continue with: dino-fast train --resume --out {job.run.path}"
