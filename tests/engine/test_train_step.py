from __future__ import annotations

import copy
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_fast.engine import train_step as step_module
from dino_fast.engine.build import build_train_state, parameter_groups
from dino_fast.engine.config import Config, build_config
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_state import TrainState
from dino_fast.engine.train_step import train_step
from dino_fast.errors import UserError
from tests import original

PER_EPOCH = 5
TINY: dict[str, Any] = {
    "data": "x", "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "global_size": 16,
    "local_size": 8, "local_crops": 3, "out_dim": 96, "head_hidden_dim": 48, "head_bottleneck_dim": 24,
    "drop_path_rate": 0.0, "batch_size": 8, "epochs": 4, "warmup_epochs": 1, "lr": 0.03, "init": "xavier",
    "warmup_teacher_temp_epochs": 2, "teacher_temp": 0.07, "momentum": 0.9,
}  # fmt: skip


@dataclass
class Crops:
    global_crops: Tensor
    local_crops: Tensor


def _config(**given: Any) -> Config:
    return build_config({**TINY, **given})


def _train_state(config: Config, precision: str = "fp32") -> TrainState:
    return build_train_state(config, 3, torch.device("cpu"), precision)


def _batch(step: int, config: Config) -> Crops:
    generator = torch.Generator().manual_seed(100 + step)
    n, large, small = config.batch_size, config.global_size, config.local_size
    return Crops(
        torch.randn(2, n, 3, large, large, generator=generator),
        torch.randn(config.local_crops, n, 3, small, small, generator=generator),
    )


def _run(train_state: TrainState, steps: range) -> list[float]:
    schedules = Schedules(train_state.config, PER_EPOCH)
    return [train_step(train_state, _batch(s, train_state.config), schedules.values_at(s), s)["loss"] for s in steps]


def _assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal weights to rounding, but for the keys' biases: the softmax does not feel them, their gradient is rounding
    noise, and AdamW scales that up to whole steps."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rows = torch.ones(len(value), dtype=torch.bool)
        if name.endswith("qkv.bias"):
            rows[len(value) // 3 : 2 * len(value) // 3] = False
        torch.testing.assert_close(found[name][rows], value[rows], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


def _predict(head: torch.nn.Module, x: Tensor) -> Tensor:
    return head.last_layer(torch.nn.functional.normalize(head.predictor(head.mlp(x)), dim=-1))  # type: ignore[operator]


def _original(train_state: TrainState, config: Config, predictor: bool = False) -> original.Trainer:
    models = []
    for name in ("student", "teacher"):
        backbone = original.ViT(16, 4, 3, config.embed_dim, config.depth, config.num_heads)
        head = original.DINOHead(
            config.embed_dim,
            config.out_dim,
            norm_last_layer=config.norm_last_layer,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
        )
        if predictor:
            wide, narrow = config.head_hidden_dim, config.head_bottleneck_dim
            linear = torch.nn.Linear
            head.predictor = torch.nn.Sequential(linear(narrow, wide), torch.nn.GELU(), linear(wide, narrow))
            if name == "student":
                head.forward = functools.partial(_predict, head)  # type: ignore[method-assign]
        models.append(original.MultiCropWrapper(backbone, head))
    models[0].load_state_dict(train_state.student.state_dict())
    crops = 2 + config.local_crops
    loss = original.DINOLoss(config.out_dim, crops, 0.04, config.teacher_temp, 2, config.epochs)
    schedule = original.cosine_scheduler
    return original.Trainer(
        *models,
        loss,
        lr=schedule(config.lr * config.batch_size / 256, 1e-6, config.epochs, PER_EPOCH, warmup_epochs=1),
        weight_decay=schedule(0.04, 0.4, config.epochs, PER_EPOCH),
        momentum=schedule(config.momentum_teacher, 1, config.epochs, PER_EPOCH),
        clip_grad=config.clip_grad,
        freeze_last_layer=int(config.freeze_last_layer),
    )


@pytest.mark.parametrize("given", [{}, {"norm_last_layer": False, "freeze_last_layer": 2.0, "clip_grad": 0.05}])
def test_losses_equal_the_published_algorithms(given: dict[str, Any]) -> None:
    config = _config(**given)
    ours = _train_state(config)
    theirs = _original(ours, config)
    for step in range(20):
        batch = _batch(step, config)
        hyperparams = Schedules(config, PER_EPOCH).values_at(step)
        loss = train_step(ours, batch, hyperparams, step)["loss"]
        expected = theirs.step([*batch.global_crops, *batch.local_crops], step, step // PER_EPOCH)
        assert loss == pytest.approx(expected, rel=1e-5), step
    torch.testing.assert_close(ours.loss.center, theirs.loss.center, rtol=1e-4, atol=1e-6)
    _assert_near(ours.teacher.state_dict(), theirs.teacher.state_dict())


def test_the_loss_falls_and_the_metrics_fit() -> None:
    config = _config(local_crops=2)
    train_state, schedules = _train_state(config), Schedules(config, PER_EPOCH)
    batch = _batch(0, config)
    rows = [train_step(train_state, batch, schedules.values_at(10), 10) for _ in range(15)]
    assert rows[-1]["kl"] < 0.5 * rows[0]["kl"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["teacher_entropy"] + row["kl"], rel=1e-5)
        assert 0 <= row["teacher_entropy"] <= math.log(config.out_dim) + 1e-4
        assert 0 < row["feature_spread"] < 1.2


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a number: .item(), float(tensor), `if tensor`, nonzero and the like."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func.__name__ for name in self.NAMES)
        return func(*args, **(kwargs or {}))


GIVEN: list[dict[str, Any]] = [
    {},
    {"grad_accum_steps": 2},
    {"optimizer": "sgd"},
    {"optimizer": "lars"},
    {"teacher_update": "previous-step"},
    {"drop_path_rate": 0.5, "norm_last_layer": False},
]


@pytest.mark.parametrize("given", GIVEN)
def test_no_host_read_in_a_step(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(center_init="first_batch", loss_impl="logits", **given)
    train_state, hyperparams, batch = _train_state(config), Schedules(config, PER_EPOCH).values_at(7), _batch(0, config)
    # These look at numbers of CPU tensors alone, for which nothing waits.
    monkeypatch.setenv("DINO_FAST_BACKEND", "multi_tensor=reference")
    monkeypatch.setattr("dino_fast.models.vit.without_dropped", lambda samples: samples)
    monkeypatch.setattr(
        sys.modules["dino_fast.ops.dino_loss"], "_scale_grad", lambda gradient, upstream: gradient * upstream
    )
    with HostReads() as reads:
        assert reads.count == 0 and torch.ones(()).item() and reads.count == 1
        train_step(train_state, batch, hyperparams, 0)
        found = train_step(train_state, batch, hyperparams, 1)
        assert reads.count == 1
    names = ["loss", "teacher_entropy", "feature_spread", *["grad_norm"] * ("optimizer" not in given), "kl"]
    assert list(found) == names and len(found) == len(names) and all(map(math.isfinite, found.values()))


def test_a_batch_of_one_has_no_spread() -> None:
    config = _config(batch_size=1)
    assert train_step(_train_state(config), _batch(0, config), Schedules(config, 1).values_at(0), 0).keys() == {
        *("loss", "teacher_entropy", "kl", "grad_norm")
    }


@pytest.mark.parametrize("start", ["zero", "first_batch"])
def test_accumulation_equals_the_large_batch(start: str) -> None:
    whole, parts = (_train_state(_config(center_init=start, grad_accum_steps=n)) for n in (1, 4))
    steps = range(6)
    assert _run(parts, steps) == pytest.approx(_run(whole, steps), rel=1e-5)
    torch.testing.assert_close(parts.loss.center, whole.loss.center, rtol=1e-5, atol=1e-6)
    _assert_near(parts.teacher.state_dict(), whole.teacher.state_dict())


def test_a_frozen_last_layer_gets_no_gradient_and_moves_later() -> None:
    config = _config(norm_last_layer=False)
    train_state, schedules = _train_state(config), Schedules(config, PER_EPOCH)
    last = train_state.student.head.last_layer
    before = last.weight_v.detach().clone()
    touched: list[int] = []
    last.weight_v.register_hook(lambda grad: touched.append(len(touched)))
    for step in range(PER_EPOCH):
        train_step(train_state, _batch(step, config), schedules.values_at(step), step)
    assert torch.equal(last.weight_v, before)
    assert torch.equal(last.weight_g, torch.ones_like(last.weight_g))
    assert not touched
    train_step(train_state, _batch(9, config), schedules.values_at(9), 9)
    assert touched
    assert not torch.equal(last.weight_v, before)
    assert not torch.equal(last.weight_g, torch.ones_like(last.weight_g))


def test_the_centre_starts_at_the_first_batch() -> None:
    config = _config(center_init="first_batch")
    train_state = _train_state(config)
    batch = _batch(0, config)
    with torch.no_grad():
        expected = train_state.teacher([batch.global_crops.flatten(0, 1)]).mean(dim=0)
    train_step(train_state, batch, Schedules(config, PER_EPOCH).values_at(0), 0)
    torch.testing.assert_close(train_state.loss.center[0], expected, rtol=1e-5, atol=1e-6)


def test_parameter_groups_are_the_published() -> None:
    train_state = _train_state(_config(norm_last_layer=False))
    names = {id(p): name for name, p in train_state.student.named_parameters()}
    decayed, plain = parameter_groups(train_state.student, train_state.teacher)
    expected = original.get_params_groups(train_state.student)
    for ours, theirs in zip((decayed, plain), expected, strict=True):
        assert [names[id(p)] for p in ours["params"]] == [names[id(p)] for p in theirs["params"]]
    followers = {id(p): name for name, p in train_state.teacher.named_parameters()}
    for group in (decayed, plain):
        pairs = zip(group["params"], group["teacher_params"], strict=True)
        assert all(names[id(p)] == followers[id(t)] for p, t in pairs)
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near(precision: str) -> None:
    config = _config()
    exact = _run(_train_state(config), range(6))
    mixed = _run(_train_state(config, precision), range(6))
    assert mixed != exact
    assert mixed == pytest.approx(exact, rel=0.05)


def _leaves(value: Any, where: str = "") -> dict[str, Tensor]:
    """The tensors of a nested state, by name."""
    if isinstance(value, Tensor):
        return {where: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {name: x for key, item in entries for name, x in _leaves(item, f"{where}/{key}").items()}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("step", [1, 9])  # while the last layer is frozen, and later
@pytest.mark.parametrize(
    "given", [{}, {"optimizer": "lars"}, {"teacher_update": "previous-step", "center_init": "first_batch"}]
)
def test_a_loss_that_is_not_finite_changes_nothing(
    backend: str, policy: str, step: int, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_FAST_BACKEND", f"multi_tensor={backend}")
    config = _config(on_nonfinite=policy, **given)
    train_state, hyperparams = _train_state(config), Schedules(config, PER_EPOCH).values_at(step)
    assert train_step(train_state, _batch(0, config), hyperparams, 0).finite
    before = copy.deepcopy(train_state.state_dict())
    batch = _batch(1, config)
    batch.global_crops[0, 0, 0, 0, 0] = torch.nan
    assert not train_step(train_state, batch, hyperparams, 1).finite
    assert all(p.grad is None for p in train_state.student.parameters())
    after = _leaves(train_state.state_dict())
    assert all(torch.equal(after[name], value) for name, value in _leaves(before).items())
    # The step after it was begun before anybody knew: with "stop" it must not move what the evidence shows.
    assert train_step(train_state, _batch(2, config), hyperparams, 2).finite
    after = _leaves(train_state.state_dict())
    same = [name for name, value in _leaves(before).items() if torch.equal(after[name], value)]
    assert (len(same) == len(after)) == (policy == "stop")


def test_a_first_batch_that_is_not_finite_leaves_the_centre() -> None:
    config = _config(center_init="first_batch", on_nonfinite="skip")
    train_state, batch = _train_state(config), _batch(0, config)
    batch.global_crops[0, 0, 0, 0, 0] = torch.inf
    assert not train_step(train_state, batch, Schedules(config, PER_EPOCH).values_at(0), 0).finite
    assert not train_state.loss.center.any()


def test_a_restored_learner_goes_on_bit_for_bit() -> None:
    config = _config(drop_path_rate=0.3)
    straight = _train_state(config)
    expected = _run(straight, range(8))
    first = _train_state(config)
    assert _run(first, range(4)) == expected[:4]
    second = _train_state(replace(config, seed=5))  # its weights must all be overwritten
    second.load_state_dict(copy.deepcopy(first.state_dict()), "here")
    second.config = config
    assert _run(second, range(4, 8)) == expected[4:]
    for name, value in straight.student.state_dict().items():
        assert torch.equal(second.student.state_dict()[name], value)


def test_stochastic_depth_is_a_function_of_seed_and_step() -> None:
    config = _config(drop_path_rate=0.5)
    torch.manual_seed(1)
    first = _run(_train_state(config), range(3))
    train_state = _train_state(config)
    torch.manual_seed(99)  # the global generator plays no part
    assert _run(train_state, range(3)) == first
    other = _train_state(config)
    other.config = replace(config, seed=7)
    assert _run(other, range(3)) != first


def test_micro_batches_and_processes_draw_what_the_whole_step_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block's rate is below that from which crops are gathered."""
    drawn: list[Tensor] = []

    def keep(_: TrainState, crops: Any, keep_indices: list[Tensor], *rest: Any) -> dict[str, Tensor]:
        drawn.extend(keep_indices)
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(step_module, "compute_step", keep)

    def masks(rank: int = 0, world: int = 1, **given: Any) -> Tensor:
        config = _config(drop_path_rate=0.19, batch_size=32, **given)
        train_state, batch = _train_state(config), _batch(0, config)
        train_state.context = SimpleNamespace(rank=rank, world=1)  # type: ignore[assignment]
        mine = Crops(*(x.chunk(world, dim=1)[rank] for x in (batch.global_crops, batch.local_crops)))
        drawn.clear()
        train_step(train_state, mine, Schedules(config, PER_EPOCH).values_at(3), 3)
        # Of each micro-batch [branches of the second block, crops of an image, images].
        return torch.cat([x.view(2, 2 + config.local_crops, -1) for x in drawn], dim=2)

    whole = masks()
    assert whole.shape == (2, 5, 32) and 0.6 < whole.double().mean() < 0.95
    assert torch.equal(masks(grad_accum_steps=4), whole)
    assert torch.equal(torch.cat([masks(rank, 2, grad_accum_steps=2) for rank in range(2)], dim=2), whole)


def test_another_models_checkpoint_is_refused() -> None:
    state = _train_state(_config(embed_dim=64)).state_dict()
    with pytest.raises(UserError, match="another model"):
        _train_state(_config()).load_state_dict(state, "runs/a")


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UserError, match="vit_tiny"):
        _train_state(_config(arch="vit_tini"))


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("kind", ["previous-epoch", "previous-step", "copy"])
def test_the_other_teachers_are_the_students_of_their_time(kind: str) -> None:
    config = _config(teacher_update=kind, freeze_last_layer=0.4)
    train_state, schedules = _train_state(config), Schedules(config, PER_EPOCH)
    students = [_weights(train_state.student)]  # before step i
    for step in range(2 * PER_EPOCH + 1):
        seen = {"previous-epoch": step // PER_EPOCH * PER_EPOCH, "previous-step": max(step - 1, 0), "copy": step}[kind]
        assert _equal(_weights(train_state.teacher), students[seen]), step
        train_step(train_state, _batch(step, config), schedules.values_at(step), step)
        students.append(_weights(train_state.student))
        assert not _equal(students[-1], students[-2]) or step == 0  # the warm-up begins at learning rate 0


def test_a_predictor_is_as_a_plain_one_after_the_students_head() -> None:
    config = _config(predictor="mlp")
    ours = _train_state(config)
    theirs = _original(ours, config, predictor=True)
    before = ours.student.head.predictor[0].weight.clone()
    for step in range(12):
        batch = _batch(step, config)
        loss = train_step(ours, batch, Schedules(config, PER_EPOCH).values_at(step), step)["loss"]
        expected = theirs.step([*batch.global_crops, *batch.local_crops], step, step // PER_EPOCH)
        assert loss == pytest.approx(expected, rel=1e-5), step
    assert not torch.equal(ours.student.head.predictor[0].weight, before)
    other = copy.deepcopy(ours)
    other.teacher.head.predictor[0].weight.fill_(math.nan)  # a run goes on alike whatever is in it: it is not used
    assert _run(other, range(12, 13)) == _run(ours, range(12, 13))


def test_without_centering_the_centre_stays_zero() -> None:
    train_state = _train_state(_config(centering=False, center_init="first_batch"))
    _run(train_state, range(3))
    assert not train_state.loss.center.any()
    other = _train_state(_config())
    _run(other, range(3))
    assert other.loss.center.any()


def test_a_convolutional_backbone_trains(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from dino_fast.models.weights.read import export_backbone

    config = _config(
        arch="torchvision/resnet18", embed_dim=None, depth=None, num_heads=None, init="published", global_size=37,
        local_size=20, norm_last_layer=False, head_bn=True, lr=0.01,
    )  # fmt: skip
    train_state = _train_state(config)
    batch, hyperparams = _batch(0, config), Schedules(config, PER_EPOCH).values_at(10)
    losses = [train_step(train_state, batch, hyperparams, 10)["kl"] for _ in range(5)]
    assert losses[-1] < losses[0]
    path = export_backbone(train_state.teacher.backbone, tmp_path / "teacher.safetensors")
    assert load_file(path).keys() == train_state.teacher.backbone.state_dict().keys()
    with pytest.raises(UserError, match="--init published"):
        _train_state(replace(config, init="xavier"))
