"""What steps found: read, judged and logged, on a GPU one step late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino_fast.engine import distributed as many
from dino_fast.engine.job import Job, Unread
from dino_fast.engine.monitor import memory
from dino_fast.errors import UserError


def settle(job: Job) -> None:
    """Reads the last step's numbers and logs them; a loss that is not finite stops the run, or is passed over."""
    unread, job.unread = job.unread, None
    if unread is None:
        return
    if unread.found.finite:
        job.skipped = 0
        record(job, unread, dict(unread.found))
    else:
        pass_over(job, unread)
        record(job, unread, {"loss": float("nan"), "skipped": True})


def pass_over(job: Job, unread: Unread) -> None:
    """Leaves the evidence of a loss that is not finite. Raises UserError where it stops the run."""
    job.skipped += 1
    limit = job.config.nonfinite_limit if job.config.on_nonfinite == "skip" else 1
    path = evidence(job, unread) if job.skipped in (1, limit) else None
    found = (
        f"the loss of step {unread.step} is {unread.found['loss']}. The step's crops, the images' numbers and the "
        f"student's weights are in {path}"
    )
    advice = (
        "Try a lower --lr, a longer --warmup-epochs, or --precision fp32, and look for odd images with 'dino-fast "
        "data check'"
    )
    if job.skipped >= limit:
        before = f"{job.skipped} losses in a row are not finite; " if limit > 1 else ""
        raise UserError(f"{before}{found}; checkpoints are as they were. {advice}")
    if path is not None:
        job.say(f"{found}. The step is passed over; {limit} in a row stop the run. {advice}")


def evidence(job: Job, unread: Unread) -> Path:
    """Saves what led to a loss that is not finite: of several processes each its own crops."""
    from safetensors.torch import save_file

    of_rank = f"-process-{job.ranks.rank}" if job.ranks.rank else ""
    path = job.run.path / f"nonfinite-step-{unread.step:08d}{of_rank}.safetensors"
    batch = unread.batch
    inputs = {"global_crops": batch.global_crops, "local_crops": batch.local_crops, "index": batch.index}
    whole = many.gathered(job.learner.student.state_dict(), keep=True)
    weights = {f"student/{name}": value for name, value in whole.items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in (inputs | weights).items()}, path)
    return path


def record(job: Job, unread: Unread, metrics: dict[str, Any]) -> None:
    """One line of metrics.jsonl, the progress bar, and advice where something goes wrong."""
    rates, speed = unread.rates, unread.measured["images_per_second"]
    row: dict[str, Any] = {
        "step": unread.step,
        "epoch": unread.batch.epoch,
        **metrics,
        **unread.measured,
        "lr": rates.lr,
        "weight_decay": rates.weight_decay,
        "momentum": rates.momentum,
        "teacher_temp": rates.teacher_temp,
        "memory": memory(str(job.learner.device)),
        "tokens_per_second": speed * job.tokens if job.tokens else None,
        "tflops": speed * job.flops / 1e12 if job.flops else None,
        "mfu": speed * job.flops / job.peak if job.flops and job.peak else None,
    }
    row = {name: value for name, value in row.items() if value is not None}
    job.run.log(row)
    job.progress.update(row | {"step": unread.step + 1})
    if job.loader.workers == 0 and job.learner.device.type == "cpu":
        row = row | {"data_wait": None}  # the same cores make the crops: more workers would not speed it up
    for advice in job.health.check(row):
        job.say(advice)
