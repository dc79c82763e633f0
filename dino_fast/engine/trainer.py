"""The training run: its beginning, the loop, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dino_fast.backends import native_missing
from dino_fast.data import Batch
from dino_fast.engine import distributed as many
from dino_fast.engine.build import choose_device, choose_precision, labelled, make_loader, open_data
from dino_fast.engine.config import Config, check_same, stored_config, to_dict, validate
from dino_fast.engine.continuing import how_to_resume, resume, save
from dino_fast.engine.cuda_graph import why_not
from dino_fast.engine.findings import settle
from dino_fast.engine.job import Job, Unread
from dino_fast.engine.online_knn import measure_knn, whole_backbone
from dino_fast.engine.profiler import profiled
from dino_fast.engine.run_dir import open_run
from dino_fast.engine.signals import Interrupted, Stop, signals_held
from dino_fast.engine.train_step import build_learner, train_step
from dino_fast.errors import UserError


def train(config: Config) -> Path:
    """Train as configured; returns the run directory. Raises UserError, and Interrupted after Ctrl-C or SIGTERM."""
    validate(config)
    kind = choose_device(config.device)
    precision = choose_precision(config.precision, kind)
    stored = stored_config(config)
    if stored is not None:
        check_same(stored, config)
    if config.keep_freed_memory and native_missing() is None:
        from dino_fast import _C

        _C.keep_freed_memory()
    with many.joined(kind.type) as ranks:
        device = torch.device(kind.type, ranks.local) if kind.type == "cuda" else kind
        data = open_data(config)
        loader = make_loader(config, data.train, device, ranks)
        out = Path(config.out) if config.out else None
        continued = config.resume and out is not None and any((out / "checkpoints").glob("step-*"))
        begun = replace(config, init_from=None) if continued else config  # a checkpoint replaces what it began from
        learner = build_learner(begun, data.train.channels, device, precision, ranks)
        with open_run(out, to_dict(config), config.resume, ranks) as run, Stop() as stop:
            if config.wandb:
                run.follow(config.wandb, to_dict(config))
            job = Job(config, data, loader, run, learner, stop)
            if resume(job):
                loop(job)
            finish(job)
            return run.path


# ---- the loop ----


def loop(job: Job) -> None:
    """From the job's step to its end: the whole of a run but its beginning and its end."""
    introduce(job)
    before = measured_knn(job) if job.step == 0 else {}  # of the untrained weights, on the first line
    with job.progress, profiled(job.config.profile, job.run.path, job.ranks.rank, job.say) as ended:
        for batch, clock in timed(job):
            rates = job.schedules.at(job.step)
            # forward, loss, backward, clip, AdamW, teacher, centre: begun, on a GPU not ended
            found = train_step(job.learner, batch, rates, job.step)
            job.step += 1
            ended()
            job.writer.poll()
            settle(job)  # the step before, where it was not
            measured = clock()
            accuracies = measured_knn(job) if job.knn_is_due() else {}
            job.unread = Unread(job.step - 1, batch, rates, found, measured | before | accuracies)
            before = {}
            if not job.late:
                settle(job)
            number = job.signal()
            if job.save_is_due(accuracies) or number:
                save(job, accuracies)
            if number:
                job.writer.wait()
                raise Interrupted(number, f"interrupted at step {job.step} and saved. {how_to_resume(job)}")
        settle(job)


def timed(job: Job) -> Iterator[tuple[Batch, Any]]:
    """Batches, each with a function that tells, after the step, its images a second and its share of waiting."""
    batches = batches_from_here(job)
    while job.step < job.end:
        asked = time.perf_counter()
        batch = next_or_save(job, batches)
        if batch is None:
            return
        got = time.perf_counter()

        def clock(asked: float = asked, got: float = got) -> dict[str, float]:
            whole = time.perf_counter() - asked
            return {"images_per_second": job.config.batch_size / whole, "data_wait": (got - asked) / whole}

        yield batch, clock


def next_or_save(job: Job, batches: Iterator[Batch]) -> Batch | None:
    """The next batch. Where the data fail for good (a lost disk, a dead worker), the run is saved before it stops."""
    failure: UserError | None = None
    batch = None
    try:
        batch = next(batches, None)
    except UserError as error:
        failure = error
    job.agree(failed=failure is not None)
    if failure is None and not job.agreed[2]:
        return batch
    reason = failure or UserError("another process found no data; its message says why")
    if job.step <= max(job.saved, 0):
        raise reason
    save(job, {})
    job.writer.wait()
    raise UserError(f"{reason}. Saved at step {job.step}. {how_to_resume(job)}") from failure


def batches_from_here(job: Job) -> Iterator[Batch]:
    """The loader's batches from the job's step on."""
    job.loader.start = divmod(job.step, job.loader.batches_per_epoch)
    batches = iter(job.loader)
    # Workers are forked here and keep the mask: a Ctrl-C for the whole group is this process's affair. And the loader's
    # iterator draws from the global generator whenever one is made, which must leave no trace.
    with signals_held(), torch.random.fork_rng(devices=[]):
        first = next(batches, None)
    if first is not None:
        yield first
        del first  # its memory is used again
        yield from batches


def measured_knn(job: Job) -> dict[str, float]:
    """The teacher's and the student's k-NN accuracies, where there are labels; said, too."""
    if job.data.bank is None or job.data.test is None:
        return {}
    channels = job.data.train.channels
    found, text = measure_knn(job.learner, channels, job.data.bank, job.data.test, job.stop.watch)
    if found:
        job.say(f"step {job.step}: {text}")
    return found


# ---- what is said before and after ----


def introduce(job: Job) -> None:
    config, learner = job.config, job.learner
    count = sum(p.numel() for p in learner.student.backbone.parameters())
    head = sum(p.numel() for p in learner.student.head.parameters())
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[learner.autocast]
    processes = f", {job.ranks.world} processes (shard {config.shard})" if job.ranks.world > 1 else ""
    job.say(
        f"{config.arch}/{config.patch_size} ({count / 1e6:.2f} M weights, head {head / 1e6:.2f} M, "
        f"K = {config.out_dim}), {len(job.data.train)} images of {config.data}, "
        f"{job.loader.batches_per_epoch} steps an epoch, {config.epochs} epochs, "
        f"{learner.device} {precision}{processes}, in {job.run.path}"
    )
    graph = why_not(learner) if learner.device.type == "cuda" and config.cuda_graph == "auto" else None
    for note in (*job.schedules.notes(), job.data.why, graph and f"no CUDA graph: {graph}"):
        if note:
            job.say(f"note: {note}")


def finish(job: Job) -> None:
    """Exports the teacher's backbone and says what there is and what to do with it."""
    from dino_fast.models.weights.read import export_backbone

    job.writer.wait()
    path = job.run.path
    backbone = whole_backbone(job.learner, job.learner.teacher, job.data.train.channels)
    if not job.ranks.first:
        return
    export_backbone(
        backbone,
        job.run.export / "teacher.safetensors",
        **({"arch": job.config.arch} if "/" in job.config.arch else {}),  # the shapes tell it of the others
        mean=list(job.config.mean),
        std=list(job.config.std),
    )
    best = f" (best k-NN {job.best:.1%} in checkpoints/best)" if job.best >= 0 else ""
    look = "knn" if labelled(job.data.train) else "attention"  # what needs labels is no use without
    job.say(
        f"finished at step {job.step}{best}. Written to {path}:\n"
        "  export/teacher.safetensors   the trained backbone\n"
        "  checkpoints/                 to continue from, or to evaluate\n"
        "  metrics.jsonl, events.out.*  every step's numbers, for you and for TensorBoard\n"
        "  config.yaml                  the settings, to repeat it\n"
        f"Try next: dino-fast eval {look} --checkpoint {path} --data {job.config.data}"
    )
