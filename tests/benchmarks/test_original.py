"""The yardstick checked by hand: the plain transcription on cases small enough to compute on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dino_fast.benchmarks import original


def test_loss_of_two_crops_and_two_prototypes():
    # One image, temperatures 1, student rows (0, 0) and (ln 3, 0): probabilities (1/2, 1/2) and (3/4, 1/4).
    # Teacher rows (0, 0) and (ln 9, 0): targets (1/2, 1/2) and (9/10, 1/10). Pairs: target 0 with crop 1, 1 with 0.
    student = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [math.log(9), 0.0]])
    loss = original.DINOLoss(2, 2, 1.0, 1.0, 0, 1, student_temp=1.0)
    first = -0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4)
    second = -0.9 * math.log(1 / 2) - 0.1 * math.log(1 / 2)
    assert loss(student, teacher, 0).item() == pytest.approx((first + second) / 2, rel=1e-6)
    # The centre moves after use, by a tenth of the mean raw logits.
    assert loss.center.flatten().tolist() == pytest.approx([0.1 * math.log(9) / 2, 0.0])


def test_local_crops_meet_both_targets_and_centre_is_subtracted():
    # Three crops, uniform student: every cross-entropy is ln 4 whatever the targets; with one peaked student row, the
    # peaked local crop (row 2) is compared with both targets, which the centre turns uniform.
    loss = original.DINOLoss(4, 3, 0.5, 0.5, 0, 1, student_temp=1.0)
    loss.center.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    teacher = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    student = torch.zeros(3, 4)
    assert loss(student, teacher, 0).item() == pytest.approx(math.log(4))
    loss.center.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    student[2, 0] = math.log(5)  # probabilities (5, 1, 1, 1) / 8: cross-entropy ln 8 - ln 5 / 4
    expected = (2 * math.log(4) + 2 * (math.log(8) - math.log(5) / 4)) / 4  # four pairs
    assert loss(student, teacher, 0).item() == pytest.approx(expected, rel=1e-6)


def test_teacher_temperature_schedule():
    schedule = original.DINOLoss(2, 2, 0.04, 0.07, 4, 6).teacher_temp_schedule
    np.testing.assert_allclose(schedule, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


@pytest.mark.parametrize("views", [2, 5])
def test_einsum_form_equals_the_pair_loop(views):
    student = torch.randn(views, 3, 7, dtype=torch.float64)
    teacher = torch.randn(2, 3, 7, dtype=torch.float64)
    loss = original.DINOLoss(7, views, 0.04, 0.04, 0, 1).double()
    loss.center.copy_(torch.randn(1, 7))
    center = loss.center[0].clone()
    pair_loop = loss(student.flatten(0, 1), teacher.flatten(0, 1), 0)
    einsum = original.einsum_dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04)
    torch.testing.assert_close(einsum, pair_loop)


def test_cosine_scheduler():
    schedule = original.cosine_scheduler(1.0, 0.0, epochs=3, steps_per_epoch=2, warmup_epochs=1)
    half = math.sqrt(0.5)
    np.testing.assert_allclose(schedule, [0, 1, 1, 0.5 + half / 2, 0.5, 0.5 - half / 2], atol=1e-12)
    with pytest.raises(AssertionError):
        original.cosine_scheduler(1.0, 0.0, epochs=1, steps_per_epoch=2, warmup_epochs=2)


def test_each_gradient_is_clipped_by_its_own_norm():
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
    assert original.clip_gradients(model, 1.0) == [5.0, 0.5]
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert model.bias.grad.item() == 0.5


def test_groups_and_freeze():
    model = nn.ModuleDict({"norm": nn.LayerNorm(3), "last_layer": nn.Linear(3, 2)})
    decayed, plain = original.get_params_groups(model)
    assert [p.shape for p in decayed["params"]] == [(2, 3)]
    assert [p.shape for p in plain["params"]] == [(3,), (3,), (2,)] and plain["weight_decay"] == 0.0
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    original.cancel_gradients_last_layer(1, model, 1)
    assert model["last_layer"].weight.grad is not None
    original.cancel_gradients_last_layer(0, model, 1)
    assert model["last_layer"].weight.grad is None and model["norm"].weight.grad is not None


def test_ema_moves_parameters_only():
    teacher, student = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    teacher.weight.data.fill_(1.0)
    student.weight.data.fill_(2.0)
    student.running_mean.fill_(7.0)
    original.ema(teacher, student, 0.75)
    assert teacher.weight.item() == 1.25 and teacher.running_mean.item() == 0.0


def test_attention_against_torch():
    attention = original.vit.Attention(12, 3, qkv_bias=True)
    x = torch.randn(2, 5, 12)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.proj.weight,
            "out_proj.bias": attention.proj.bias,
        }
    )
    torch.testing.assert_close(attention(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_head_gives_cosines_where_the_last_layer_is_normed():
    head = original.DINOHead(3, 6, hidden_dim=8, bottleneck_dim=4)
    logits = head(torch.randn(5, 3))
    assert logits.shape == (5, 6) and logits.abs().max() <= 1 + 1e-6
    vectors = nn.functional.normalize(head.last_layer.weight_v, dim=1)
    unit = nn.functional.normalize(head.mlp(torch.ones(1, 3)), dim=1)
    torch.testing.assert_close(head(torch.ones(1, 3)), unit @ vectors.T)
    assert not head.last_layer.weight_g.requires_grad and head.last_layer.weight_v.requires_grad


def test_wrapper_keeps_the_order_of_crops():
    backbone = original.ViT(8, 4, 1, 8, 1, 2)
    wrapper = original.MultiCropWrapper(backbone, nn.Identity())
    crops = [torch.randn(2, 1, size, size) for size in (8, 8, 4)]
    torch.testing.assert_close(wrapper(crops), torch.cat([backbone(crop) for crop in crops]))


def test_one_step_by_hand():
    """A student of one weight per prototype: the first AdamW step moves by lr against the gradient's sign."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 2))

        def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(crops) * self.weight

    student, teacher = Rows(), Rows()
    student.weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    run = original.Trainer(student, teacher, original.DINOLoss(2, 2, 1.0, 1.0, 0, 1, 2.0), [0.1], [0.5], [0.75], 0.0, 0)
    loss = run.step([torch.ones(1, 1)] * 2, 0, 0)
    # Logits (1, -1): the teacher's first probability is sigmoid(2), the student's, at temperature 2, sigmoid(1) below
    # it. So the weights decay by lr * wd = 0.05 and move by lr = 0.1 apart.
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert loss == pytest.approx(-p * math.log(q) - (1 - p) * math.log(1 - q), rel=1e-6)
    torch.testing.assert_close(student.weight.data, torch.tensor([[1.05, -1.05]]))
    torch.testing.assert_close(teacher.weight.data, torch.tensor([[1.0125, -1.0125]]))
