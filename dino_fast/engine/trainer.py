"""A training run from its configuration to its end: the loop, its checkpoints, and resuming."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from dino_fast.backends import native_unavailable_reason
from dino_fast.data import Batch, Source, TrainLoader
from dino_fast.data.inspect import pixel_note
from dino_fast.data.open import IN_MEMORY
from dino_fast.defaults import torch_defaults
from dino_fast.engine import checkpoint
from dino_fast.engine.build import (
    Data,
    build_train_state,
    is_labeled,
    make_loader,
    open_data,
    resolve_device,
    resolve_precision,
    unsupported_reason,
)
from dino_fast.engine.checkpoint import AsyncCheckpointer
from dino_fast.engine.config import Config, check_same, stored_config, to_dict, validate, with_whole_paths
from dino_fast.engine.distributed import broadcast_state, init_distributed
from dino_fast.engine.estimate import flops_per_image, memory_parts, peak_flops, sizes_of
from dino_fast.engine.fingerprint import DIFFERING, fingerprint, share_differing
from dino_fast.engine.health import Health
from dino_fast.engine.memory_limit import check_memory, explained_out_of_memory, memory_limit
from dino_fast.engine.metrics import PendingStep, dump_nonfinite
from dino_fast.engine.online_knn import measure_knn, whole_backbone
from dino_fast.engine.parallelize import full_state_dict
from dino_fast.engine.profiler import profiled
from dino_fast.engine.progress import Progress, memory
from dino_fast.engine.run_dir import RunDir, open_run
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.signals import Interrupted, SignalHandler, block_signals
from dino_fast.engine.train_state import TrainState
from dino_fast.engine.train_step import train_step
from dino_fast.errors import UserError

SAVE_SHARE = 0.1  # saving takes at most this share of the time, however short the epochs are


@torch_defaults()
def train(config: Config, source: Source | None = None) -> Path:
    """Trains as configured, on `source` where it is given; returns the run directory.

    Raises UserError, and Interrupted after a signal.
    """
    validate(config)
    kind = resolve_device(config.device)
    precision = resolve_precision(config.precision, kind)
    config, stored = with_whole_paths(config), stored_config(config)
    if stored is not None:
        check_same(with_whole_paths(stored), config)
        named = config.data == "demo" or source is not None or config.data.startswith(IN_MEMORY)
        if config.data == stored.data and not named and not os.path.isabs(config.data):
            raise UserError(
                f"the run in {config.out} trains on {config.data!r}, which is not in this folder (its config.yaml has "
                "no whole path); say where the images are with --data"
            )
    if config.keep_freed_memory and native_unavailable_reason() is None:
        from dino_fast import _C

        _C.keep_freed_memory()
    with init_distributed(kind.type) as context, explained_out_of_memory():
        device = torch.device(kind.type, context.local) if kind.type == "cuda" else kind
        data = open_data(config, source)
        loader = make_loader(config, data.train, device, context)
        if device.type == "cpu":
            parts = memory_parts(config, data.train.channels, precision, context.world, device.type)
            check_memory(sum(parts.values()), context.local_world, memory_limit())
        out = Path(config.out) if config.out else None
        resumes = config.resume and out is not None and has_checkpoint(out)
        begun = replace(config, init_from=None) if resumes else config  # the checkpoint replaces those weights
        state = build_train_state(begun, data.train.channels, device, precision, context)
        newest = Newest(config, data)
        run = open_run(out, to_dict(config), config.resume, context, newest.load)
        with run as run_dir, SignalHandler() as signals:
            if config.wandb:
                run_dir.init_wandb(config.wandb, to_dict(config))
            trainer = Trainer(config, data, loader, run_dir, state, signals)
            if trainer.resume(newest):
                trainer.fit()
            trainer.finish()
            return run_dir.path


def defers_metrics(device: torch.device) -> bool:
    """Whether a step's metrics are read only after the next step was started.

    Waiting for them would leave a GPU idle; a CPU has finished the step by then.
    """
    return device.type == "cuda"


def has_checkpoint(out: Path) -> bool:
    """Whether the run in `out` has a checkpoint, whole or not."""
    return any((out / "checkpoints").glob("step-*"))


class Newest:
    """The newest whole checkpoint of a run that is resumed, loaded and checked on rank 0 before the run changes."""

    def __init__(self, config: Config, data: Data) -> None:
        self.config, self.data = config, data
        self.loaded: tuple[int, dict[Any, Any]] | None = None
        self.notes: list[str] = []  # what was passed over

    def load(self, path: Path) -> None:
        """Loads it from the run in `path`. Raises UserError where none is whole, or the images are others."""
        if not self.config.resume:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.loaded = checkpoint.load(path / "checkpoints")
        self.notes = [str(warning.message) for warning in caught]
        if self.loaded is None:
            return
        saved = self.loaded[1]
        if saved["images"] != len(self.data.train):
            raise UserError(
                f"the run in {path} trains on {saved['images']} images, and {self.config.data} has "
                f"{len(self.data.train)}; give the same images with --data, or start a new run with another --out"
            )
        differing = share_differing(saved.get("fingerprint", []), fingerprint(self.data.train))
        if differing > DIFFERING:
            raise UserError(
                f"the run in {path} trains on other images than those of {self.config.data}: {differing:.0%} of a "
                "sample differ. Give the same images with --data, or start a new run with another --out"
            )
        if differing:
            self.notes.append(f"{differing:.0%} of a sample of the images are not what they were when the run began")


class Trainer:
    """A run: `resume`, then `fit`, then `finish`.

    `step` counts optimizer steps done, `end` is their number at the end. With several processes all of them make the
    same calls; rank 0 writes the files.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        loader: TrainLoader,
        run_dir: RunDir,
        state: TrainState,
        signals: SignalHandler,
    ) -> None:
        self.config, self.data, self.loader = config, data, loader
        self.run_dir, self.state, self.signals = run_dir, state, signals
        self.context = state.context
        self.schedules = Schedules(config, loader.batches_per_epoch)
        self.step = 0
        self.end = min(self.schedules.steps, config.max_steps or self.schedules.steps)
        self.best_knn = -1.0  # the teacher's highest k-NN accuracy
        self.saved_step, self.saved_at = -1, time.monotonic()  # of the last checkpoint
        self.nonfinite_steps = 0  # in a row
        self.pending: PendingStep | None = None
        self.fingerprint = fingerprint(data.train) if self.context.first else []  # now: the data may be lost later
        # Maximum over the processes: signal; whether a save by epochs is affordable, one by minutes due; data failed.
        self._agreed = [0, 1, 0, 0]
        device, channels = str(state.device), data.train.channels
        sizes = sizes_of(config, channels)
        self.tokens_per_image = sizes.tokens if sizes else 0
        self.flops_per_image = flops_per_image(config, channels)
        autocast = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[state.autocast]
        self.precision = "bf16" if state.bf16_models is not None else autocast
        peak = peak_flops(state.device, self.precision)
        self.peak_flops = None if peak is None else peak * self.context.world
        background = config.save_in_background
        self.checkpointer = AsyncCheckpointer(state.device.type == "cuda" if background is None else background)
        self.progress = Progress(self.end, device=device, enabled=self.context.first)
        patience = max(200, self.schedules.freeze_steps + self.schedules.warmup_steps)
        self.health = Health(config.out_dim, patience=patience, workers=loader.workers, device=device)
        loader.on_bad = self.say if self.context.first else self._log_from_rank
        if state.graph is not None:
            state.graph.say = self.say

    # ---- the loop ----

    def fit(self) -> None:
        """Trains from the current step to the end. Raises Interrupted after a signal, once the run is saved."""
        self._introduce()
        untrained = self._measure_knn() if self.step == 0 else {}  # before any update, logged with the first step
        profile = profiled(self.config.profile, self.run_dir.path, self.context.rank, self.say)
        with self.progress, contextlib.closing(self.loader), profile as step_profiler:
            for batch, elapsed in self._timed_batches():
                hyperparams = self.schedules.values_at(self.step)
                metrics = train_step(self.state, batch, hyperparams, self.step)  # on a GPU started, not finished
                self.step += 1
                step_profiler()
                self.checkpointer.poll()
                self.flush_metrics()  # of the step before, if that was deferred
                measured = elapsed() | untrained
                knn = self._measure_knn() if self._knn_is_due() else {}
                self.pending = PendingStep(self.step - 1, batch, hyperparams, metrics, measured | knn)
                untrained = {}
                if not defers_metrics(self.state.device):
                    self.flush_metrics()
                signal = self._signal()
                if self._save_is_due(knn) or signal:
                    self.save_checkpoint(knn)
                if signal:
                    self._interrupt(signal)
            self.flush_metrics()

    def _timed_batches(self) -> Iterator[tuple[Batch, Callable[[], dict[str, float]]]]:
        """Batches, each with a function that gives, after the step, images per second and the share of data waiting."""
        batches = self._batches()
        while self.step < self.end:
            asked = time.perf_counter()
            batch = self._next_batch(batches)
            if batch is None:
                return
            got = time.perf_counter()

            def elapsed(asked: float = asked, got: float = got) -> dict[str, float]:
                seconds = time.perf_counter() - asked
                return {"images_per_second": self.config.batch_size / seconds, "data_wait": (got - asked) / seconds}

            yield batch, elapsed

    def _next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch. If the data fail for good (a lost disk, a dead worker), saves the run and raises."""
        failure: UserError | None = None
        batch = None
        try:
            batch = next(batches, None)
        except UserError as error:
            failure = error
        if self.context.world > 1:
            clock = self._save_is_affordable(), self._minutes_are_over()
            own = (self.signals.number or 0, *(self.context.first and due for due in clock), failure is not None)
            self._agreed = self.context.all_reduce_max(*own)
        if failure is None and not self._agreed[3]:
            return batch
        reason = failure or UserError("another process found no data; its message says why")
        if self.step > max(self.saved_step, 0):
            self.save_checkpoint({})
        elif self.saved_step <= 0:  # there is nothing to save
            raise reason
        if signal := self._signal():  # sent to the workers as well, which it ended
            self._interrupt(signal)
        self.checkpointer.wait()
        raise UserError(f"{reason}. Saved at step {self.step}. {self._how_to_resume()}") from failure

    def _interrupt(self, signal: int) -> NoReturn:
        """Raises Interrupted once the checkpoint is on disk."""
        self.checkpointer.wait()
        raise Interrupted(signal, f"interrupted at step {self.step} and saved. {self._how_to_resume()}")

    def _batches(self) -> Iterator[Batch]:
        """The loader's batches from the current step on."""
        self.loader.start = divmod(self.step, self.loader.batches_per_epoch)
        batches = iter(self.loader)
        # Workers are forked here and inherit the signal mask: this process alone handles a Ctrl-C sent to the group.
        # They unblock SIGTERM, by which they are ended.
        # The loader's iterator draws from the global generator when it is made, which must leave no trace.
        with block_signals(), torch.random.fork_rng(devices=[]):
            first = next(batches, None)
        if first is not None:
            yield first
            del first  # its memory is used again
            yield from batches

    def _signal(self) -> int:
        """The signal that ends the run on all processes, or 0."""
        return self._agreed[0] if self.context.world > 1 else self.signals.number or 0

    def _is_every(self, epochs: float) -> bool:
        return epochs > 0 and self.step % max(1, round(epochs * self.loader.batches_per_epoch)) == 0

    # ---- metrics ----

    def flush_metrics(self) -> None:
        """Reads and logs the pending step's metrics, if there is one; handles a non-finite loss."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.metrics.finite:
            self.nonfinite_steps = 0
            self.log_step(pending, dict(pending.metrics))
        else:
            self.handle_nonfinite(pending)
            self.log_step(pending, {"loss": float("nan"), "skipped": True})

    def handle_nonfinite(self, pending: PendingStep) -> None:
        """Dumps the inputs of a step with a non-finite loss. Raises UserError if it stops the run."""
        self.nonfinite_steps += 1
        limit = self.config.nonfinite_limit if self.config.on_nonfinite == "skip" else 1
        path = None
        if self.nonfinite_steps in (1, limit):
            path = dump_nonfinite(pending, self.state, self.run_dir.path)
        text = (
            f"the loss of step {pending.step} is {pending.metrics['loss']}. The step's crops, the images' numbers and "
            f"the student's weights are in {path}"
        )
        advice = (
            "Try a lower --lr, a longer --warmup-epochs, or --precision fp32, and look for odd images with 'dino-fast "
            "data check'"
        )
        if self.nonfinite_steps >= limit:
            before = f"{self.nonfinite_steps} losses in a row are not finite; " if limit > 1 else ""
            raise UserError(f"{before}{text}; checkpoints are as they were. {advice}")
        if path is not None:
            self.say(f"{text}. The step is skipped; {limit} in a row stop the run. {advice}")

    def log_step(self, pending: PendingStep, metrics: dict[str, Any]) -> None:
        """Writes a line of metrics.jsonl, updates the progress bar and prints advice about the run's health."""
        hyperparams, speed = pending.hyperparams, pending.measured["images_per_second"]
        tokens, flops, peak = self.tokens_per_image, self.flops_per_image, self.peak_flops
        row: dict[str, Any] = {
            "step": pending.step,
            "epoch": pending.batch.epoch,
            **metrics,
            **pending.measured,
            "lr": hyperparams.lr,
            "weight_decay": hyperparams.weight_decay,
            "momentum": hyperparams.momentum,
            "teacher_temp": hyperparams.teacher_temp,
            "memory": memory(str(self.state.device)),
            "tokens_per_second": speed * tokens if tokens else None,
            "tflops": speed * flops / 1e12 if flops else None,
            "mfu": speed * flops / peak if flops and peak else None,
        }
        row = {name: value for name, value in row.items() if value is not None}
        self.run_dir.log(row)
        self.progress.update(row | {"step": pending.step + 1})
        if self.loader.workers == 0 and self.state.device.type == "cpu":
            row = row | {"data_wait": None}  # the same cores make the crops: more workers would not speed it up
        for advice in self.health.check(row):
            self.say(advice)

    def _knn_is_due(self) -> bool:
        """Every `knn_every` epochs and at the end; step 0 has the measurement before any update."""
        due = self.step == self.end or self._is_every(self.config.knn_every)
        return self.step > 1 and self.config.knn_every > 0 and due

    def _measure_knn(self) -> dict[str, float]:
        """k-NN accuracies of teacher and student; empty without labels, or after a signal."""
        if self.data.bank is None:
            return {}
        channels = self.data.train.channels
        knn, text = measure_knn(self.state, channels, self.data.bank, self.data.test, self.signals.watch)
        if knn:
            self.say(f"step {self.step}: {text}")
        return knn

    # ---- checkpoints ----

    def resume(self, newest: Newest) -> bool:
        """With `--resume` takes over the newest whole checkpoint. Returns False if the run was already finished."""
        if not self.config.resume:
            return True
        loaded, newest.loaded = broadcast_state(self.context, newest.loaded), None
        for note in newest.notes:
            self.say(f"note: {note}")
        path = self.run_dir.path
        if loaded is None:
            self.run_dir.truncate_metrics(-1)
            self.say(f"{path} has no checkpoint yet: starting over")
            return True
        self.step, saved = loaded
        self.state.load_state_dict(saved, str(path))
        self.best_knn, self.saved_step = saved["best"], self.step
        if self.step >= self.end:
            self.say(f"the run in {path} is finished: {self.step} steps of {self.end}")
            return False
        self.run_dir.truncate_metrics(self.step - 1)
        device = str(self.state.device)
        self.progress = Progress(self.end, start=self.step, device=device, enabled=self.context.first)
        self.say(f"continuing at step {self.step} of {self.end}")
        return True

    def save_checkpoint(self, measured: dict[str, float]) -> None:
        """Saves a checkpoint, also as the best one if `measured` has the highest k-NN accuracy so far.

        Pending metrics are flushed first: no checkpoint contains a step whose loss has not been checked.
        """
        self.flush_metrics()
        is_best = measured.get("knn", -1.0) > self.best_knn
        self.best_knn = max(self.best_knn, measured.get("knn", -1.0))
        saved = {
            **self.state.state_dict(),
            "config": to_dict(self.config),
            "images": len(self.data.train),
            "fingerprint": self.fingerprint,
            "num_heads": getattr(self.state.teacher.backbone, "num_heads", None),
            "best": self.best_knn,
        }
        self.saved_step, self.saved_at = self.step, time.monotonic()
        if self.context.world > 1 or self.checkpointer.background:  # copies: the next step changes the weights
            saved = full_state_dict(saved, keep=self.context.first)
        if self.context.first:
            self.checkpointer.save(self.run_dir.checkpoints, self.step, saved, self.config.keep_checkpoints, is_best)

    def _save_is_due(self, measured: dict[str, float]) -> bool:
        """At the end, at a new best, every so many steps and minutes, and every `save_every` epochs if affordable."""
        if self.step == self.end or measured.get("knn", -1.0) > self.best_knn:
            return True
        if self.config.save_every_steps and self.step % self.config.save_every_steps == 0:
            return True
        affordable, minutes_over = map(bool, self._agreed[1:3])
        if self.context.world == 1:
            affordable, minutes_over = self._save_is_affordable(), self._minutes_are_over()
        return minutes_over or (self._is_every(self.config.save_every) and affordable)

    def _save_is_affordable(self) -> bool:
        return (time.monotonic() - self.saved_at) * SAVE_SHARE >= self.checkpointer.seconds

    def _minutes_are_over(self) -> bool:
        minutes = self.config.save_every_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    # ---- messages and the end ----

    def say(self, text: str) -> None:
        """Prints a message and appends it to log.txt, on rank 0."""
        if self.context.first:
            self.progress.message(text)
            self.run_dir.log_text(text)

    def _log_from_rank(self, text: str) -> None:
        """Appends a message of another rank to log.txt."""
        self.run_dir.log_text(f"process {self.context.rank}: {text}")

    def _how_to_resume(self) -> str:
        return f"Continue with: dino-fast train --resume --out {self.run_dir.path}"

    def _introduce(self) -> None:
        """Prints what is about to be trained."""
        config, state = self.config, self.state
        count = sum(p.numel() for p in state.student.backbone.parameters())
        head = sum(p.numel() for p in state.student.head.parameters())
        processes = f", {self.context.world} processes (fsdp {config.fsdp})" if self.context.world > 1 else ""
        self.say(
            f"{config.arch}/{config.patch_size} ({count / 1e6:.2f} M weights, head {head / 1e6:.2f} M, "
            f"K = {config.out_dim}), {len(self.data.train)} images of {config.data}, "
            f"{self.loader.batches_per_epoch} steps an epoch, {config.epochs} epochs, "
            f"{state.device} {self.precision}{processes}, in {self.run_dir.path}"
        )
        wants_graph = state.device.type == "cuda" and config.cuda_graph == "auto"
        reason = unsupported_reason(state) if wants_graph else None
        for line in self.data.train.all_notes() if self.context.first else ():  # printed when the images were opened
            self.run_dir.log_text(f"note: {line}")
        pixels = pixel_note(self.data.train)
        for note in (*self.schedules.notes(), self.data.note, pixels, reason and f"no CUDA graph: {reason}"):
            if note:
                self.say(f"note: {note}")

    def finish(self) -> None:
        """Exports the teacher's backbone and prints what was written and what to try next."""
        from dino_fast.models.weights.read import export_backbone

        self.checkpointer.wait()
        path = self.run_dir.path
        backbone = whole_backbone(self.state, self.state.teacher, self.data.train.channels)
        if not self.context.first:
            return
        export_backbone(
            backbone,
            self.run_dir.export / "teacher.safetensors",
            **(  # others are recognized by their shapes
                {"arch": self.config.arch, "img_size": [self.config.global_size] * 2} if "/" in self.config.arch else {}
            ),
            mean=list(self.config.mean),
            std=list(self.config.std),
            **({"pixel_range": list(self.data.train.pixel_range)} if self.data.train.pixel_range else {}),
        )
        best = f" (best k-NN {self.best_knn:.1%} in checkpoints/best)" if self.best_knn >= 0 else ""
        look = "knn" if is_labeled(self.data.train) else "attention"  # k-NN needs labels
        following = f"dino-fast eval {look} --checkpoint {path} --data {self.config.data}"
        if self.config.data.startswith(IN_MEMORY):
            following = f"dino_fast.load({str(path)!r}), which turns images into features"
        self.say(
            f"finished at step {self.step}{best}. Written to {path}:\n"
            "  export/teacher.safetensors   the trained backbone\n"
            "  checkpoints/                 to continue from, or to evaluate\n"
            "  metrics.jsonl, events.out.*  every step's numbers, for you and for TensorBoard\n"
            "  config.yaml                  the settings, to repeat it\n"
            f"Try next: {following}"
        )
