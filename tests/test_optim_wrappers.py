"""AdamWEMA in other people's training loops and checkpoints: accelerate, Hugging Face's Trainer, Lightning, and
torch.distributed.checkpoint's state-dict API on one process and on two with FSDP2."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dino_fast.optim import AdamWEMA

MOMENTUM = 0.9
STEPS = 4


class Pair(nn.Module):
    """A student, its teacher, and a loss between them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.to(self.student[0].weight.dtype)
        return {"loss": (self.student(x) - self.teacher(x.flip(0)) - 1).square().mean()}

    def optimizer(self, **options: Any) -> AdamWEMA:
        """In two groups that bring their teachers, as DINO's are."""
        groups: list[dict[str, Any]] = [{"params": [], "teacher_params": [], "weight_decay": d} for d in (0.1, 0.0)]
        for p, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            groups[p.ndim == 1]["params"].append(p)
            groups[p.ndim == 1]["teacher_params"].append(t)
        return AdamWEMA(groups, None, lr=0.01, clip_grad=0.5, **options)

    def weights(self) -> list[Tensor]:
        return [whole(p).clone() for p in self.parameters()]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()  # type: ignore[operator]


def batch(i: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(i))


def momentum_at(i: int) -> float:
    return MOMENTUM + 0.01 * i


def train(pair: Pair, optimizer: AdamWEMA, first: int = 0, last: int = STEPS, *, scheduled: bool = False) -> None:
    """The plain loop: what every other must equal."""
    for i in range(first, last):
        pair(batch(i))["loss"].backward()
        optimizer.step(momentum=momentum_at(i) if scheduled else MOMENTUM)
        optimizer.zero_grad()


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
    pair = Pair(dtype)
    train(pair, pair.optimizer(), **options)
    return pair


def assert_equal(pair: Pair, expected: list[Tensor]) -> None:
    for found, value in zip(pair.weights(), expected, strict=True):
        assert torch.equal(found, value)


# ---- training loops ----


@pytest.mark.filterwarnings("error:the optimizer has teacher_params")
@pytest.mark.parametrize("scheduled", [False, True])
def test_accelerate(scheduled: bool, tmp_path: Path) -> None:
    Accelerator = pytest.importorskip("accelerate").Accelerator

    accelerator, pair = Accelerator(cpu=True), Pair()
    model, optimizer = accelerator.prepare(pair, pair.optimizer(momentum=MOMENTUM))

    def steps(first: int, last: int) -> None:
        for i in range(first, last):
            for group in optimizer.param_groups if scheduled else ():
                group["momentum"] = momentum_at(i)
            accelerator.backward(model(batch(i))["loss"])
            optimizer.step()
            optimizer.zero_grad()

    steps(0, 2)
    accelerator.save_state(str(tmp_path))
    steps(2, STEPS)
    expected = trained(scheduled=scheduled).weights()
    assert_equal(pair, expected)
    accelerator.load_state(str(tmp_path))
    steps(2, STEPS)
    assert_equal(pair, expected)


@pytest.mark.filterwarnings("error:the optimizer has teacher_params")
def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Schedule(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **others: Any) -> None:
            for group in optimizer.param_groups:
                group["momentum"] = momentum_at(state.global_step)

    def run(pair: Pair, callbacks: list[Any], **resume: Any) -> None:
        optimizer = pair.optimizer(momentum=MOMENTUM)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, save_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0,
        )  # fmt: skip
        trainer = Trainer(
            pair,
            arguments,
            train_dataset=Rows(),
            callbacks=callbacks,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        )
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(Rows())
        trainer.train(**resume)

    pair = Pair()
    run(pair, [])
    assert_equal(pair, trained().weights())
    expected, pair = trained(scheduled=True).weights(), Pair()
    run(pair, [Schedule()])
    assert_equal(pair, expected)
    resumed = Pair()
    run(resumed, [Schedule()], resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(resumed, expected)


class Rows(torch.utils.data.Dataset):
    """The rows of the batches, one after another."""

    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": batch(index // 8)[index % 8]}


@pytest.mark.filterwarnings("error:the optimizer has teacher_params")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_lightning(precision: str) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
            return self.pair(x)["loss"]

        def configure_optimizers(self) -> AdamWEMA:
            return self.pair.optimizer(momentum=MOMENTUM)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, precision=precision, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch(i) for i in range(STEPS)], batch_size=None))
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    assert all(p.dtype == dtype for p in module.pair.parameters())
    assert_equal(module.pair, trained(dtype).weights())


# ---- the state-dict API ----

OPTIONS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


def resumes(make: Callable[[], Pair], folder: Path, options: StateDictOptions) -> None:
    """Saves after two steps, goes on; loads into another network, and goes on there the same."""
    pair = make()
    optimizer = pair.optimizer(momentum=MOMENTUM)
    train(pair, optimizer, 0, 2)
    dcp.save(states(pair, optimizer, options), checkpoint_id=folder)
    train(pair, optimizer, 2, STEPS)

    other = make()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    before, again = other.weights(), other.optimizer(momentum=0.5)
    loaded = states(other, again, options)
    assert_equal(other, before)  # making the state moved nothing
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(other, loaded["model"], options=options)
    set_optimizer_state_dict(other, again, loaded["optimizer"], options=options)
    train_without_momentum(other, again)
    assert_equal(other, pair.weights())


def train_without_momentum(pair: Pair, optimizer: AdamWEMA) -> None:
    """By the groups' momentum, which was loaded."""
    for i in range(2, STEPS):
        pair(batch(i))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def states(pair: Pair, optimizer: AdamWEMA, options: StateDictOptions) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(pair, options=options),
        "optimizer": get_optimizer_state_dict(pair, optimizer, options=options),
    }


@pytest.mark.filterwarnings("error:the optimizer has teacher_params")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_state_dict_api(options: str, dtype: torch.dtype, tmp_path: Path) -> None:
    resumes(lambda: Pair(dtype), tmp_path, OPTIONS[options])


@pytest.mark.filterwarnings("error:the optimizer has teacher_params")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_state_dict_api_without_a_momentum() -> None:
    pair = Pair()
    optimizer = pair.optimizer()
    options = OPTIONS["flat"]
    state = get_optimizer_state_dict(pair, optimizer, options=options)
    assert not any("teacher" in name or "momentum" in name for name in state if name.startswith("param_groups"))
    set_optimizer_state_dict(pair, optimizer, state, options=options)
    train(pair, optimizer)


def sharded() -> Pair:
    from torch.distributed.fsdp import fully_shard

    pair = Pair()
    for network in (pair.student, pair.teacher):
        for layer in (network[0], network[2]):
            fully_shard(layer)
        fully_shard(network)
    return pair


def rank(folder: Path) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for name, options in OPTIONS.items():
        resumes(sharded, folder / name, options)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_the_state_dict_api_on_two_sharded_ranks(tmp_path: Path) -> None:
    from tests.engine.test_distributed import finish, start

    finish(start(2, "-m", "tests.test_optim_wrappers", str(tmp_path)))


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
