"""Number formats, checkpointing and compilation of the step."""

from __future__ import annotations

import copy

import pytest
import torch

from dino_fast.engine import parallelize
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_step import train_step
from dino_fast.errors import UserError
from dino_fast.models import VisionTransformer, set_drop_path_seed

from .test_train_step import PER_EPOCH, _batch, _config, _run, _train_state


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_bit(mode):
    given = {"drop_path_rate": 0.4, "depth": 3}
    plain, checkpointed = (_train_state(_config(checkpoint_activations=m, **given)) for m in ("none", mode))
    assert _run(checkpointed, range(3)) == _run(plain, range(3))
    for name, value in plain.student.state_dict().items():
        assert torch.equal(checkpointed.student.state_dict()[name], value), name


def _kept_bytes(mode):
    """Bytes that autograd keeps for the backward pass of a backbone, its weights left out."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 4, embed_dim=64, depth=4, num_heads=2)
    parallelize.checkpoint_blocks(model, mode)
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.update({x.data_ptr(): x.nbytes} if x.data_ptr() not in own else {}), x)[1], lambda x: x
    ):
        out = model([torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 16)])
    out.sum().backward()
    return sum(kept.values())


def test_full_checkpointing_keeps_less():
    assert _kept_bytes("full") < 0.25 * _kept_bytes("none")


def test_checkpointing_is_for_our_backbones():
    with pytest.raises(UserError, match="vit_"):
        parallelize.checkpoint_blocks(torch.nn.Linear(2, 2), "full")


def test_bf16_weights_follow_float32_masters():
    config = _config()
    train_state = _train_state(config, "bf16")
    student, teacher = train_state.forward_models
    assert {p.dtype for p in (*student.parameters(), *teacher.parameters())} == {torch.bfloat16}
    assert {p.dtype for p in (*train_state.student.parameters(), *train_state.teacher.parameters())} == {torch.float32}
    losses = _run(train_state, range(6))
    for exact, half in ((train_state.student, student), (train_state.teacher, teacher)):
        for (name, p), q in zip(exact.named_parameters(), half.parameters(), strict=True):
            assert torch.equal(p.to(torch.bfloat16), q), name
    assert all(p.grad is None for p in (*student.parameters(), *train_state.student.parameters()))
    again = _train_state(config, "bf16")
    again.load_state_dict(copy.deepcopy(train_state.state_dict()), "here")
    assert _run(again, range(6, 8)) == _run(train_state, range(6, 8))
    assert losses != _run(_train_state(config), range(6))


def test_bf16_prototypes_stay_while_frozen():
    config = _config(norm_last_layer=False)
    train_state, schedules = _train_state(config, "bf16"), Schedules(config, PER_EPOCH)
    last = train_state.forward_models[0].head.last_layer
    before = last.weight_v.detach().clone()
    for step in range(PER_EPOCH):
        train_step(train_state, _batch(step, config), schedules.values_at(step), step)
    assert torch.equal(last.weight_v, before)
    train_step(train_state, _batch(9, config), schedules.values_at(9), 9)
    assert not torch.equal(last.weight_v, before)


@pytest.mark.parametrize("given", [{"head_bn": True}, {"optimizer": "sgd"}])
def test_bf16_is_autocasts_where_weights_must_be_float32(given):
    train_state = _train_state(_config(**given), "bf16")
    assert train_state.bf16_models is None and train_state.autocast is torch.bfloat16
    assert len(_run(train_state, range(2))) == 2


def test_a_block_is_one_graph_for_all_sizes():
    model = VisionTransformer(32, 8, embed_dim=32, depth=4, num_heads=2, drop_path_rate=0.6)
    images = [torch.randn(10, 3, 32, 32), torch.randn(20, 3, 16, 16)]
    set_drop_path_seed(model, 1, 1)
    want = model(images)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    set_drop_path_seed(model, 1, 1)
    got = model(images)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses():
    config = _config(drop_path_rate=0.3)
    want = _run(_train_state(config), range(3))
    torch._dynamo.reset()
    assert _run(_train_state(_config(drop_path_rate=0.3, compile=True)), range(3)) == pytest.approx(want, rel=1e-5)


def test_tf32_is_set_for_the_process():
    try:
        parallelize.use_tf32(True)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        parallelize.use_tf32(False)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cudnn.allow_tf32  # raises where the flags of cuDNN differ, as torch.export does
