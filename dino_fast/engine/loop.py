"""The training run: data, the loop, evaluation, checkpoints, and how it ends."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_fast.backends import cuda_missing, native_missing
from dino_fast.data import Batch, Source, Subset, TrainLoader, open_source, split, train_loader
from dino_fast.data.on_gpu import nvjpeg_missing
from dino_fast.engine import checkpoint
from dino_fast.engine import ranks as many
from dino_fast.engine.config import Config, check_same, multi_crop, stored_config, to_dict, validate
from dino_fast.engine.cost import flops_per_image, peak_flops, sizes_of
from dino_fast.engine.evaluate import measure_knn, whole_backbone
from dino_fast.engine.monitor import Health, Progress, memory
from dino_fast.engine.profile import profiled
from dino_fast.engine.ranks import ALONE, Ranks
from dino_fast.engine.run import Run, open_run
from dino_fast.engine.saving import Writer
from dino_fast.engine.schedules import Rates, Schedules
from dino_fast.engine.step import (
    Learner,
    NonFiniteLoss,
    build_learner,
    learner_state,
    restore_learner,
    train_step,
)
from dino_fast.engine.stop import Interrupted, Stop, signals_held
from dino_fast.errors import UserError

# Saving takes at most this share of the time, however short the epochs are.
SAVE_SHARE = 0.1


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
            metrics = guarded_step(job, batch, rates)  # forward, loss, backward, clip, AdamW, teacher, centre
            job.step += 1
            ended()
            job.writer.poll()
            metrics |= clock()
            measured = measured_knn(job) if job.knn_is_due() else {}
            record(job, batch, rates, metrics | before | measured)
            before = {}
            number = job.signal()
            if job.save_is_due(measured) or number:
                save(job, measured)
            if number:
                job.writer.wait()
                raise Interrupted(number, f"interrupted at step {job.step} and saved. {how_to_resume(job)}")


@dataclass
class Job:
    """A run under way."""

    config: Config
    data: Data
    loader: TrainLoader
    run: Run
    learner: Learner
    stop: Stop
    step: int = 0  # optimizer steps done
    best: float = -1.0  # the teacher's highest k-NN accuracy
    saved: int = -1  # step of the last checkpoint
    saved_at: float = field(default_factory=time.monotonic)
    skipped: int = 0  # steps in a row whose loss was not finite

    def __post_init__(self) -> None:
        config, device = self.config, str(self.learner.device)
        self.schedules = Schedules(config, self.loader.batches_per_epoch)
        self.end = min(self.schedules.steps, config.max_steps or self.schedules.steps)
        self.ranks = self.learner.ranks
        self.agreed = [0, 1, 0]  # of all processes: the signal, whether the clock allows a save, lost data
        self.unwritten: Callable[[], None] | None = None
        channels = self.data.train.channels
        sizes = sizes_of(self.config, channels)
        self.tokens = sizes.tokens if sizes else 0  # of an image
        self.flops = flops_per_image(self.config, channels)
        precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.learner.autocast]
        peak = peak_flops(self.learner.device, precision)
        self.peak = None if peak is None else peak * self.ranks.world
        background = self.config.save_in_background
        self.writer = Writer(self.learner.device.type == "cuda" if background is None else background)
        self.progress = Progress(self.end, device=device, enabled=self.ranks.first)
        patience = max(200, self.schedules.freeze_steps + self.schedules.warmup_steps)
        self.health = Health(config.out_dim, patience=patience, workers=self.loader.workers, device=device)
        self.loader.on_bad = self.say if self.ranks.first else self.tell

    def say(self, text: str) -> None:
        """To the console and to log.txt, from the first process."""
        if self.ranks.first:
            self.progress.message(text)
            self.run.note(text)

    def tell(self, text: str) -> None:
        """What another process has to say: to log.txt."""
        self.run.note(f"process {self.ranks.rank}: {text}")

    def flush(self) -> None:
        """Writes the line of metrics that waits for its numbers."""
        write, self.unwritten = self.unwritten, None
        if write is not None:
            write()

    def agree(self, failed: bool) -> None:
        """Before a step: what all processes will do after it."""
        if self.ranks.world > 1:
            self.agreed = self.ranks.agree(self.stop.number or 0, self.ranks.first and self._waited(), failed)

    def signal(self) -> int:
        """The signal that ends the run, or 0."""
        return self.agreed[0] if self.ranks.world > 1 else self.stop.number or 0

    def _waited(self) -> bool:
        """Whether the last save is long enough ago for another one not to become a burden."""
        return (time.monotonic() - self.saved_at) * SAVE_SHARE >= self.writer.seconds

    def _every(self, epochs: float) -> bool:
        return epochs > 0 and self.step % max(1, round(epochs * self.loader.batches_per_epoch)) == 0

    def knn_is_due(self) -> bool:
        """Every so many epochs and at the end; the first step's line has the measurement before any update."""
        due = self.step == self.end or self._every(self.config.knn_every)
        return self.step > 1 and self.config.knn_every > 0 and due

    def save_is_due(self, measured: dict[str, float]) -> bool:
        """At the end, at a new best, and every so many epochs, where saving does not become a burden."""
        if self.step == self.end or measured.get("knn", -1.0) > self.best:
            return True
        return self._every(self.config.save_every) and bool(self.agreed[1] if self.ranks.world > 1 else self._waited())


def guarded_step(job: Job, batch: Batch, rates: Rates) -> dict[str, Any]:
    """`train_step`; a loss that is not finite stops the run, or is passed over, and the evidence is left."""
    try:
        metrics: dict[str, Any] = train_step(job.learner, batch, rates, job.step)
        job.skipped = 0
        return metrics
    except NonFiniteLoss as error:
        job.skipped += 1
        limit = job.config.nonfinite_limit if job.config.on_nonfinite == "skip" else 1
        path = evidence(job, batch) if job.skipped in (1, limit) else None
        found = (
            f"the loss of step {job.step} is {error}. The step's crops, the images' numbers and the student's weights "
            f"are in {path}"
        )
        advice = (
            "Try a lower --lr, a longer --warmup-epochs, or --precision fp32, and look for odd images with 'dino-fast "
            "data check'"
        )
        if job.skipped >= limit:
            before = f"{job.skipped} losses in a row are not finite; " if limit > 1 else ""
            raise UserError(f"{before}{found}; checkpoints are as they were. {advice}") from error
        if path is not None:
            job.say(f"{found}. The step is passed over; {limit} in a row stop the run. {advice}")
        return {"loss": float("nan"), "skipped": True}


def evidence(job: Job, batch: Batch) -> Path:
    """Saves what led to a loss that is not finite: of several processes each its own crops."""
    from safetensors.torch import save_file

    of_rank = f"-process-{job.ranks.rank}" if job.ranks.rank else ""
    path = job.run.path / f"nonfinite-step-{job.step:08d}{of_rank}.safetensors"
    inputs = {"global_crops": batch.global_crops, "local_crops": batch.local_crops, "index": batch.index}
    whole = many.gathered(job.learner.student.state_dict(), keep=True)
    weights = {f"student/{name}": value for name, value in whole.items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in (inputs | weights).items()}, path)
    return path


def record(job: Job, batch: Batch, rates: Rates, metrics: dict[str, float]) -> None:
    """One line of metrics.jsonl, the progress bar, and advice where something goes wrong."""
    row: dict[str, Any] = {
        "step": job.step - 1,  # updates that the weights of this loss had seen
        "epoch": batch.epoch,
        **metrics,
        "lr": rates.lr,
        "weight_decay": rates.weight_decay,
        "momentum": rates.momentum,
        "teacher_temp": rates.teacher_temp,
        "memory": memory(str(job.learner.device)),
        "tokens_per_second": metrics["images_per_second"] * job.tokens if job.tokens else None,
        "tflops": metrics["images_per_second"] * job.flops / 1e12 if job.flops else None,
        "mfu": metrics["images_per_second"] * job.flops / job.peak if job.flops and job.peak else None,
    }
    row = {name: value for name, value in row.items() if value is not None}
    norm, step = job.learner.grad_norm, job.step

    def write() -> None:
        if norm is not None and "skipped" not in row:
            row["grad_norm"] = norm()[0]
        job.run.log(row)
        job.progress.update(row | {"step": step})

    # A GPU has not ended the step yet, and would stand still while its gradients' norm is waited for.
    job.flush()
    job.unwritten = write
    if job.learner.device.type == "cpu":
        job.flush()
    if job.loader.workers == 0 and job.learner.device.type == "cpu":
        row = row | {"data_wait": None}  # the same cores make the crops: more workers would not speed it up
    for advice in job.health.check(row):
        job.say(advice)


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


# ---- data ----


@dataclass
class Data:
    """The images of a run; `bank` and `test` are None where k-NN is not measured, for the reason in `why`."""

    train: Source
    bank: Source | None = None
    test: Source | None = None
    why: str = ""


def open_data(config: Config) -> Data:
    """Opens the images; holds some out for k-NN where they have labels and no held-out part of their own."""
    source = open_source(config.data)
    if config.channels is not None:
        for part in (source, source.test):
            if part is not None:
                part.channels = config.channels
    if config.knn_every == 0:
        return Data(source, why="k-NN evaluation is off (knn_every 0)")
    if not labelled(source):
        return Data(source, why="no k-NN evaluation: the images have no labels (class sub-folders give them labels)")
    training, test = split(source)
    if not labelled(test):
        return Data(training, why="no k-NN evaluation: the held-out images have no labels")
    return Data(training, sample(training, config.knn_images), sample(test, config.knn_images))


def labelled(source: Source) -> bool:
    return source.labels is not None and bool((source.labels >= 0).any())


def sample(source: Source, count: int) -> Source:
    """At most `count` images, always the same ones."""
    if len(source) <= count:
        return source
    return Subset(source, np.sort(np.random.default_rng(0).permutation(len(source))[:count]))


def make_loader(config: Config, source: Source, device: torch.device, ranks: Ranks = ALONE) -> TrainLoader:
    colour = source.channels == 3 and len(config.mean) == 3
    crops = multi_crop(config)
    if not colour:
        crops.statistics(source.channels)  # refuses means that do not fit, before anything is written
    return train_loader(
        source,
        crops,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=choose_workers(config.workers, device, ranks.local_world),
        rank=ranks.rank,
        world=ranks.world,
        epochs=config.epochs,
        max_bad=config.max_bad,
        pin_memory=device.type == "cuda",
        gpu=choose_cropping(config.augment_on, config.decode_on, device),
        encoded=config.decode_on == "gpu",
    )


def choose_cropping(augment_on: str, decode_on: str, device: torch.device) -> torch.device | None:
    """The GPU that makes the crops, None for the CPU."""
    missing = cuda_missing() if device.type == "cuda" else f"the run trains on {device}"
    if augment_on == "gpu" and missing:
        raise UserError(f"--augment-on gpu: {missing}; use --augment-on cpu or auto ('dino-fast info' tells more)")
    if decode_on == "gpu" and (missing or augment_on == "cpu"):
        raise UserError(f"--decode-on gpu: {missing or 'the crops are made on the CPU'}; use --decode-on cpu")
    if augment_on == "cpu" or missing:
        return None
    if decode_on == "gpu" and (reason := nvjpeg_missing(device)):
        raise UserError(f"--decode-on gpu: torchvision cannot ({reason}); use --decode-on cpu")
    return device


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no GPU here ('dino-fast info' tells what it finds); use --device cpu"
        )
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def choose_workers(count: int | None, device: torch.device, processes: int = 1) -> int:
    """On a CPU none: training and loading share the cores. On a GPU one for each of this process's share of them.

    On two cores the demo ran at 1030 images/s without workers, 990 with one, 870 with two.
    """
    if count is not None:
        return count
    return 0 if device.type == "cpu" else max(1, min(10, (os.cpu_count() or 1) // processes))


def choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# ---- beginning, checkpoints, end ----


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
    for note in (*job.schedules.notes(), job.data.why):
        if note:
            job.say(f"note: {note}")


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
    """A checkpoint, and the best one where the k-NN accuracy is the highest so far."""
    job.flush()
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


def finish(job: Job) -> None:
    """Exports the teacher's backbone and says what there is and what to do with it."""
    from dino_fast.models.checkpoints import export_backbone

    job.flush()
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


def how_to_resume(job: Job) -> str:
    return f"Continue with: dino-fast train --resume --out {job.run.path}"
