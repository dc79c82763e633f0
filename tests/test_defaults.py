"""Results do not depend on PyTorch's default dtype or default device, which belong to the caller's program.

Every public function runs under the defaults float64 and bfloat16 and under a default device that is not the inputs'
(meta: a buffer that lands there by mistake has no memory), and must give the bits, dtypes and devices that it gives
under PyTorch's own. Models are the exception that torch.nn makes: their weights are built as the defaults say.
"""

from __future__ import annotations

import functools
import importlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree

import dino_fast
from dino_fast.attention import packed_attention
from dino_fast.augment import CropParams, MultiCrop, statistics
from dino_fast.data import ArraySource, Subset, TrainLoader, eval_batches, open_source, split, train_loader
from dino_fast.data.decode import decode
from dino_fast.engine.config import build_config
from dino_fast.eval import boundary, finetune, knn, segment
from dino_fast.eval import linear as linear_protocol
from dino_fast.eval.common.crops import random_crop
from dino_fast.knn import extract_features, knn_accuracy, knn_grid, largest, leave_one_out_accuracy, neighbors
from dino_fast.loss import (
    DINOLoss,
    bank_loss,
    dino_loss,
    gram_loss,
    koleo_loss,
    linear_dino_loss,
    linear_ibot_loss,
    sinkhorn_center,
)
from dino_fast.models import (
    DINOHead,
    DINOv2,
    MultiCropWrapper,
    VisionTransformer,
    build_backbone,
    export_backbone,
    load_backbone,
)
from dino_fast.ops.linear.matmul import Norm, linear, matmul
from dino_fast.ops.linear.mlp import mlp
from dino_fast.optim import AdamWEMA, as_found_inf, build_optimizer, ema_update

B, V, K, D = 3, 4, 20, 8
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def images(n: int = 8, size: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8, device="cpu")


def labels(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int64, device="cpu") % 3


def with_gradients(function: Callable[..., Any], *leaves: torch.Tensor) -> list[Any]:
    """The outputs of `function`, and the gradients w.r.t. `leaves` of the first."""
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    outputs = pytree.tree_leaves(function(*leaves))
    (outputs[0] if outputs[0].ndim == 0 else outputs[0].square().sum()).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in leaves)]


# ---- losses, attention, linear layers ----


def loss(dtype: torch.dtype, **options: Any) -> list[Any]:
    teacher, center = drawn(2, B, K, seed=1, dtype=dtype), drawn(K, seed=2)
    # A product, since the gradient may be written over logits that are no leaf.
    return with_gradients(lambda s: dino_loss(s * 1, teacher, center, **TEMPS, **options), drawn(V, B, K).to(dtype))


def loss_module(dtype: torch.dtype) -> list[Any]:
    module = built(lambda: DINOLoss(K, V, 0.02, 0.07, 3, 5))
    student, teacher = drawn(V * B, K, dtype=dtype), drawn(2 * B, K, seed=1, dtype=dtype)
    found = [with_gradients(functools.partial(module, teacher_output=teacher, epoch=i), student) for i in range(2)]
    module.update_center(teacher.float().mean(0))
    return [*found, module.center, *module.state_dict().values(), *module.teacher_temp_schedule]


def linear_loss(dtype: torch.dtype, gain: bool) -> list[Any]:
    fixed = drawn(2, B, D, seed=1, dtype=dtype), drawn(K, D, seed=2), drawn(K, seed=3)
    gains = {"student_gain": drawn(K, seed=5).abs(), "teacher_gain": drawn(K, seed=6).abs()} if gain else {}
    return with_gradients(
        lambda z, w: linear_dino_loss(z, w, *fixed, **TEMPS, **gains), drawn(V, B, D).to(dtype), drawn(K, D, seed=4)
    )


def ibot_loss(rows: int = B) -> list[Any]:
    fixed = drawn(rows, D, seed=1), drawn(K, D, seed=2), drawn(K, seed=3), drawn(rows, seed=7).abs()
    return with_gradients(lambda z, w: linear_ibot_loss(z, w, *fixed, **TEMPS), drawn(rows, D), drawn(K, D, seed=4))


def attention(dtype: torch.dtype, backend: str) -> list[Any]:
    ends = torch.tensor([0, 5, 12], dtype=torch.int32, device="cpu")
    return with_gradients(lambda x: packed_attention(x, ends, 7, backend=backend), drawn(12, 3, 2, 8).to(dtype))


def linear_layers() -> list[Any]:
    norm = Norm(drawn(D, seed=3), drawn(D, seed=4), 1e-6)
    x, w, bias, back = drawn(B, D), drawn(K, D, seed=1), drawn(K, seed=2), drawn(D, K, seed=5)
    shift = drawn(D, seed=6)
    return [
        matmul(x, w.t(), bias),
        *with_gradients(lambda x, w: linear(x, w, bias), x, w),
        *with_gradients(lambda x, w: linear(x, w, bias, norm), x, w),
        *with_gradients(lambda x, w: mlp(x, w, bias, back, shift, norm), x, w),
    ]


# ---- optimizers ----


def averaged(dtype: torch.dtype) -> torch.Tensor:
    teacher = [drawn(3, 4, seed=1, dtype=dtype)]
    ema_update(teacher, [drawn(3, 4)], 0.9)
    return teacher[0]


def steps(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    params = [torch.nn.Parameter(drawn(3, 4, dtype=dtype)), torch.nn.Parameter(drawn(5, seed=1, dtype=dtype))]
    teachers = [p.detach().clone() for p in params]
    if name == "AdamWEMA":
        optimizer: Any = AdamWEMA(params, teachers, lr=0.1, **options)
    else:
        optimizer = build_optimizer(name, [{"params": params, "teacher_params": teachers}], 0.1, 0.04, 0.3)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = drawn(*p.shape, seed=step + i, dtype=dtype)
        optimizer.step(momentum=0.9)
    states = [s for state in optimizer.state.values() for s in state.values()]
    return [*(p.detach() for p in params), *teachers, *states]


def scaled_step() -> list[Any]:
    p = torch.nn.Parameter(drawn(3, 4))
    optimizer = AdamWEMA([p], [p.detach().clone()], clip_grad=0.3, clip_mode="global")
    optimizer.grad_scale = torch.tensor(8.0, dtype=torch.float32, device="cpu")
    optimizer.found_inf = torch.zeros((), dtype=torch.float32, device="cpu")
    p.grad = drawn(3, 4, seed=1)
    optimizer.step(momentum=0.9)
    return [p.detach(), optimizer.grad_norm]


def overflow() -> Any:
    return as_found_inf(torch.ones((), dtype=torch.bool, device="cpu"))


# ---- crops and data ----

CROPS = MultiCrop(16, 8, 2)


def crops_of(backend: str, dtype: torch.dtype) -> list[Any]:
    params = CROPS.sample(8, torch.Generator().manual_seed(0))
    out = tuple(torch.zeros(n, 8, 3, size, size, dtype=dtype, device="cpu") for n, size in ((2, 16), (2, 8)))
    table = CROPS.crop_table(params, [(20, 20)] * 8)
    CROPS.crop(list(images()), table, out=out, backend=backend)
    sixteen = [x.to(torch.int32).mul(257).to(torch.uint16) for x in images(2)]
    return [*CROPS.apply(list(images()), params, dtype=dtype, backend=backend), *out, *CROPS.apply(sixteen, params[:2])]


def crop_parameters() -> list[Any]:
    each = CROPS.sample_each([3, 4])
    joined = CropParams.concatenate([each[0], each[1:]])
    return [*joined.to_dict().values(), *statistics((0.5,), (0.2,), 3), *CROPS.crop_table(each, [(20, 30), (9, 8)])]


def source() -> ArraySource:
    return ArraySource(images(12), labels(12).numpy())


def loaded(workers: int = 0) -> list[Any]:
    batches = train_loader(source(), CROPS, batch_size=4, seed=0, epochs=1, workers=workers)
    assert isinstance(batches, TrainLoader)
    return [(b.global_crops.clone(), b.local_crops.clone(), b.index) for b in batches]


def sources() -> list[Any]:
    whole = open_source((images(20).numpy(), labels(20).numpy()))
    parts = [*split(whole), Subset(whole, np.arange(3))]
    return [[part.read(i) for i in range(len(part))] for part in parts]


def decoded() -> list[Any]:
    found = []
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(images(1)[0].permute(1, 2, 0).numpy()).save(file, kind)
        found.append(decode(file.getvalue(), 3))
    return found


# ---- evaluation ----


def nearest() -> list[Any]:
    bank, queries = (torch.nn.functional.normalize(drawn(n, D, seed=n), dim=1) for n in (30, 12))
    given = bank, labels(30), queries, labels(12)
    return [
        *neighbors(bank, queries, 5),
        *largest(bank @ bank.T, 3),
        *knn_accuracy(*given, k=5),
        knn_grid(*given, ks=(1, 5)),
        *leave_one_out_accuracy(*given[:2], k=5),
    ]


def features() -> list[Any]:
    torch.manual_seed(0)
    return list(extract_features(built(lambda: VisionTransformer(**SMALL)), eval_batches(source(), 16, batch_size=5)))


def protocols() -> list[Any]:
    given = drawn(24, D), labels(24)
    heads = linear_protocol.fit(lambda epoch: given, 3, rates=(0.1, 0.01), epochs=2, batch_size=8)
    mask = drawn(9, 9) > 0
    return [
        heads.weight, heads.bias, linear_protocol.accuracy(heads, *given), random_crop(images(1)[0], (16, 16), 3),
        boundary.outline(mask), boundary.dilate(mask, 2), boundary.f_measure(mask, ~mask), segment.jaccard(mask, ~mask),
    ]  # fmt: skip


# ---- models, whose weights were built before ----


def built(make: Callable[[], Any]) -> Any:
    """A model built under PyTorch's own defaults, always the same."""
    with defaults(torch.float32, "cpu"):
        torch.manual_seed(0)
        return make()


def model(make: Callable[[], Any], *inputs: torch.Tensor) -> list[Any]:
    network = built(make).train()
    outputs = [network(x) for x in inputs]
    sum(output.square().sum() for output in outputs).backward()
    return [*(x.detach() for x in outputs), *(p.grad for p in network.parameters() if p.requires_grad)]


def wrapped() -> list[Any]:
    def make() -> MultiCropWrapper:
        return MultiCropWrapper(VisionTransformer(**SMALL), DINOHead(32, K, hidden_dim=16, bottleneck_dim=D))

    network = built(make)
    out = network([drawn(2 * B, 3, 16, 16), drawn(2 * B, 3, 8, 8, seed=1)])
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in network.parameters() if p.requires_grad)]


def saved_and_loaded() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = export_backbone(built(lambda: DINOv2(**SMALL, registers=2)), Path(folder) / "b.safetensors")
        return list(load_backbone(path).state_dict().values())


PIXELS, OTHER = drawn(B, 3, 16, 16), drawn(B, 3, 24, 32, seed=1)
HALF = torch.bfloat16
# name: (the public names that it covers, the call)
CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    **{f"dino_loss {dtype}": ("dino_loss", lambda dtype=dtype: loss(dtype)) for dtype in (torch.float32, HALF)},
    "dino_loss in place": ("dino_loss", lambda: loss(HALF, inplace=True)),
    "dino_loss reference": ("dino_loss", lambda: loss(torch.float64, backend="reference")),
    "DINOLoss": ("DINOLoss", lambda: loss_module(torch.float32)),
    "DINOLoss bfloat16": ("DINOLoss", lambda: loss_module(HALF)),
    "linear_dino_loss": ("linear_dino_loss", lambda: linear_loss(torch.float32, False)),
    "linear_dino_loss bfloat16": ("linear_dino_loss", lambda: linear_loss(HALF, True)),
    "linear_dino_loss float64": ("linear_dino_loss", lambda: linear_loss(torch.float64, True)),
    "linear_ibot_loss": ("linear_ibot_loss", ibot_loss),
    "linear_ibot_loss without rows": ("linear_ibot_loss", lambda: ibot_loss(0)),
    "koleo_loss": ("koleo_loss", lambda: with_gradients(koleo_loss, drawn(B, D))),
    "gram_loss": ("gram_loss", lambda: with_gradients(lambda x: gram_loss(x, drawn(2, 9, 4, seed=1)), drawn(2, 9, 4))),
    "bank_loss": ("bank_loss", lambda: with_gradients(lambda x: bank_loss(x, drawn(B, D), drawn(K, D)), drawn(B, D))),
    "sinkhorn_center": ("sinkhorn_center", lambda: [sinkhorn_center(drawn(B, D), drawn(K, D), teacher_temp=0.04)]),
    "packed_attention": ("packed_attention", lambda: attention(torch.float32, "auto")),
    "packed_attention bfloat16": ("packed_attention", lambda: attention(HALF, "auto")),
    "packed_attention reference": ("packed_attention", lambda: attention(torch.float32, "reference")),
    "linear layers": ("", linear_layers),
    "ema_update": ("ema_update", lambda: [averaged(torch.float32), averaged(HALF), averaged(torch.float64)]),
    "as_found_inf": ("as_found_inf", overflow),
    "AdamWEMA": ("AdamWEMA", lambda: steps("AdamWEMA", clip_grad=0.3)),
    "AdamWEMA bfloat16": ("AdamWEMA", lambda: steps("AdamWEMA", HALF, clip_grad=0.3, clip_mode="global")),
    "AdamWEMA float64": ("AdamWEMA", lambda: steps("AdamWEMA", torch.float64, clip_grad=0.3)),
    "AdamWEMA scaled": ("AdamWEMA", scaled_step),
    **{name: ("build_optimizer SGDEMA LARSEMA", lambda name=name: steps(name)) for name in ("adamw", "sgd", "lars")},
    "crops": ("MultiCrop", lambda: crops_of("auto", torch.float32)),
    "crops bfloat16": ("MultiCrop", lambda: crops_of("auto", HALF)),
    "crops reference": ("MultiCrop", lambda: crops_of("reference", torch.float32)),
    "crop parameters": ("CropParams statistics", crop_parameters),
    "train_loader": ("train_loader TrainLoader Batch ArraySource", loaded),
    "train_loader with a worker": ("train_loader", lambda: loaded(workers=1)),
    "sources": ("open_source split Subset Source", sources),
    "decode": ("", decoded),
    "k-NN": ("neighbors largest knn_accuracy knn_grid leave_one_out_accuracy", nearest),
    "features": ("extract_features eval_batches", features),
    "protocols": ("", protocols),
    "VisionTransformer": ("VisionTransformer", lambda: model(lambda: VisionTransformer(**SMALL), PIXELS, OTHER)),
    "DINOv2": ("DINOv2", lambda: model(lambda: DINOv2(**SMALL, registers=2), PIXELS, OTHER)),
    "DINOHead": ("DINOHead WeightNormLinear", lambda: model(lambda: DINOHead(D, K, hidden_dim=16), drawn(B, D))),
    "MultiCropWrapper": ("MultiCropWrapper", wrapped),
    "saved and loaded": ("export_backbone load_backbone", saved_and_loaded),
    "build_backbone": (
        "build_backbone ARCHITECTURES vit_tiny vit_small vit_base vit_large",
        lambda: model(lambda: build_backbone("vit_tiny", depth=1), PIXELS),
    ),
}
# Public names that no call has, with the reason.
LEFT_OUT = {
    "CLIP_MODES": "names",
    "LIBRARIES": "names",
    "ImageError": "an exception",
    "__version__": "a string",
    "set_drop_path_seed": "sets numbers",
    "pair": "sizes",
    "render_report": "writes a page, no tensors",
    "train": "below, with the evaluation of what it trained",
    "load": "below",
    "embed": "below",
    "Run": "below: what train returns",
    "Backbone": "below: what load returns",
    "Embeddings": "below: what embed returns",
    "SourceNote": "a warning",
    "Config": "settings, no tensors",
    "build_config": "settings, no tensors",
    "evaluate": "below",
}
MODULES = (
    "",
    ".attention",
    ".augment",
    ".data",
    ".engine",
    ".eval.knn",
    ".knn",
    ".loss",
    ".models",
    ".optim",
    ".report",
)


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_default_device(None if before[1].type == "cpu" else before[1])


def assert_same(got: Any, wanted: Any) -> None:
    (got, shape), (wanted, wanted_shape) = pytree.tree_flatten(got), pytree.tree_flatten(wanted)
    assert shape == wanted_shape
    for x, y in zip(got, wanted, strict=True):
        if isinstance(y, torch.Tensor):
            assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape)
            assert torch.equal(x, y)
        else:
            assert x == y


SETTINGS = [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_defaults(name: str) -> None:
    call = CALLS[name][1]
    wanted = call()
    assert_same(call(), wanted)  # else the comparison would say nothing
    for dtype, device in SETTINGS:
        with defaults(dtype, device):
            got = call()
        assert_same(got, wanted)


def test_every_public_name_is_called() -> None:
    covered = {name for names, _ in CALLS.values() for name in names.split()}
    for module in MODULES:
        public = importlib.import_module(f"dino_fast{module}")
        names = getattr(public, "__all__", [])
        names = names or [x for x, value in vars(public).items() if getattr(value, "__module__", "") == public.__name__]
        missing = {x for x in names if not x.startswith("_")} - covered - set(LEFT_OUT)
        assert not missing, f"dino_fast{module}: give {sorted(missing)} a call here, or a reason to be left out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i, image in enumerate(images(24)):
        path = root / ("train" if i < 16 else "val") / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


def trained(folder: Path, out: Path) -> list[Any]:
    """The weights of a run of two steps, and what evaluations find of them."""
    config = build_config({
        "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "global_size": 16,
        "local_size": 8, "local_crops": 2, "out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8,
        "drop_path_rate": 0.1, "batch_size": 8, "epochs": 1, "warmup_epochs": 0, "knn_every": 1, "device": "cpu",
        "data": str(folder), "out": str(out),
    })  # fmt: skip
    run = dino_fast.train(config)
    embeddings = dino_fast.embed(folder / "val", run, device="cpu")
    layer = {"rates": (0.1,), "epochs": 1, "blocks": 1, "device": "cpu"}
    recipe = finetune.Recipe(epochs=1, batch_size=8)
    tuned, classifier = finetune.evaluate(out, folder, recipe=recipe, device="cpu")
    return [
        dino_fast.load(run, device="cpu")(list(images(2))),
        torch.from_numpy(embeddings.features),
        embeddings.paths,
        knn.evaluate(out, folder, k=3, device="cpu"),
        [linear_protocol.evaluate(out, folder, crops=crops, **layer)[1].weight for crops in ("centre", "random")],
        tuned["top1"],
        [p.detach() for p in classifier.parameters()],
    ]


def test_training_and_evaluations_do_not_depend_on_the_defaults(folder: Path, tmp_path: Path) -> None:
    wanted = trained(folder, tmp_path / "run")
    for dtype, device in SETTINGS:
        shutil.move(tmp_path / "run", tmp_path / f"before {dtype} {device}")  # the results name the folder
        with defaults(dtype, device):
            got = trained(folder, tmp_path / "run")
        assert_same(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_are_built_as_the_defaults_say(dtype: torch.dtype) -> None:
    with defaults(dtype, "cpu"):
        network = MultiCropWrapper(DINOv2(**SMALL, registers=2), DINOHead(32, K, hidden_dim=16, bottleneck_dim=D))
        assert {x.dtype for x in network.state_dict().values()} == {dtype}
    out = network([PIXELS.to(dtype), OTHER.to(dtype)])
    assert out.dtype == dtype and out.isfinite().all()
    with defaults(torch.float32, "meta"):
        network = VisionTransformer(**SMALL)
        assert {x.device.type for x in network.state_dict().values()} == {"meta"}
        assert network(PIXELS.to("meta")).device.type == "meta"
