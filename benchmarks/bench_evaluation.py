"""What the evaluations do with features, beside plain transcriptions of the published code: the k-NN vote, linear
classification at a grid of rates, masks from attention, label propagation through a video, rankings, copies.

Fine-tuning has no row: its steps are those of any training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast import knn
from dino_fast.benchmarks import original
from dino_fast.benchmarks.original.knn import knn as original_knn
from dino_fast.benchmarks.original.video import propagate as original_propagate
from dino_fast.eval import copy, linear, retrieval, segment, video
from dino_fast.eval.attention import mass_mask
from dino_fast.eval.common.backbone import class_attention
from dino_fast.models import VisionTransformer
from dino_fast.seeding import derive_seed

from .harness import Comparison, Contender, Row, run_all

SECONDS = 2.0  # a comparison's rounds, at least five of them


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    torch.manual_seed(0)
    scale = 4 if quick else 1
    yield votes((10, 20, 100, 200), 20_000 // scale)
    yield votes((20,), 20_000 // scale)
    yield layers(5000 // scale)
    yield attention(320 // scale)
    yield masks(32 // scale)
    yield propagation(8 // scale)
    yield rankings(400 // scale, 5000)
    yield copies(128 // scale)


def _pair(
    protocol: str, shape: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor], limit: float
) -> Comparison:
    """Ours and the transcription, whose result is the reference."""
    contenders = [Contender("dino-fast", ours, ours=True), Contender("transcription", plain, baseline=True)]
    return Comparison("evaluation", f"{protocol}: {shape}", "float32", contenders, plain, error_limit=limit,
                      seconds=SECONDS)  # fmt: skip


def votes(ks: tuple[int, ...], bank: int) -> Comparison:
    """Top-1 of 500 queries for every k."""
    classes, dim, count = 1000, 384, 500
    centres = torch.randn(classes, dim)
    labels, asked = torch.randint(classes, (bank,)), torch.randint(classes, (count,))
    features, queries = (F.normalize(centres[x] + 2 * torch.randn(len(x), dim), dim=1) for x in (labels, asked))

    def ours() -> Tensor:
        rows = knn.knn_grid(features, labels, queries, asked, ks, (0.07,), classes)
        return torch.tensor([row["top1"] for row in rows])

    def plain() -> Tensor:
        return torch.tensor([original_knn(features, labels, queries, asked, k, 0.07, classes)[0] for k in ks])

    shape = f"{count} queries, bank of {bank} x {dim}, k {', '.join(map(str, ks))}"
    return _pair("knn", shape, ours, plain, 2 / count)  # equal votes may go either way


def layers(images: int) -> Comparison:
    """Ten epochs at six rates, trained at once or one after the other."""
    classes, dim, epochs, batch = 100, 768, 10, 1024
    x, y = torch.randn(images, dim), torch.randint(classes, (images,))

    def ours() -> Tensor:
        heads = linear.fit(lambda epoch: (x, y), classes, epochs=epochs, batch_size=batch)
        return torch.stack([heads.layer(i)[0] for i in range(len(heads.rates))])

    def plain() -> Tensor:
        return torch.stack([alone(rate) for rate in linear.RATES])

    def alone(rate: float) -> Tensor:
        layer = nn.Linear(dim, classes)
        with torch.no_grad():
            start = torch.randn(dim, 1, classes, generator=torch.Generator().manual_seed(0)) * 0.01
            layer.weight.copy_(start[:, 0].T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
        for epoch in range(epochs):
            order = torch.randperm(images, generator=torch.Generator().manual_seed(derive_seed(0, 3, epoch)))
            for index in order.split(batch):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[index]), y[index]).backward()
                optimizer.step()
            schedule.step()
        return layer.weight.detach()

    return _pair("linear", f"{images} x {dim}, {classes} classes, 6 rates, {epochs} epochs", ours, plain, 1e-4)


def attention(side: int) -> Comparison:
    """The class token's attention in the last of four blocks, at patches of 8."""
    ours = VisionTransformer(side, 8, embed_dim=192, depth=4, num_heads=3).eval()
    theirs = original.ViT(side, 8, embed_dim=192, depth=4, num_heads=3).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, side, side)

    @torch.no_grad()
    def plain() -> Tensor:
        patches = theirs.patch_embed(image)
        x = torch.cat((theirs.cls_token, patches), dim=1)
        x = x + theirs.position_embedding(x.shape[1], side, side)
        for block in theirs.blocks[:-1]:
            x = block(x)
        last = theirs.blocks[-1]
        q, k, _ = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
        matrix = (q @ k.transpose(-2, -1) * 64**-0.5).softmax(dim=-1)  # [1, heads, 1 + N, 1 + N]
        return matrix[:, :, 0, 1:]

    shape = f"{side} x {side} pixels, patches of 8, 4 blocks of 192"
    return _pair("attention", shape, lambda: class_attention(ours, image), plain, 1e-4)


def masks(images: int) -> Comparison:
    """Masks of six heads and their Jaccard index with a true mask of 480 x 640 pixels."""
    maps = torch.rand(images, 6, 30, 40) ** 3
    truth, valid = torch.rand(480, 640) < 0.3, torch.ones(480, 640, dtype=torch.bool)

    def ours() -> Tensor:
        kept = [mass_mask(one.flatten(1)).view_as(one) for one in maps]
        return torch.stack([segment.patch_jaccard(one, truth, valid) for one in kept])

    def plain() -> Tensor:
        return torch.tensor([[one_head(head) for head in image] for image in maps], dtype=torch.float64)

    def one_head(head: Tensor) -> float:
        value, order = head.flatten().double().sort()
        kept = (value / value.sum()).cumsum(0) > 0.4
        kept = kept[order.argsort()].view(1, 1, 30, 40).float()
        large = F.interpolate(kept, scale_factor=16, mode="nearest")[0, 0].numpy() > 0
        true = truth.numpy()
        return float(np.sum(large & true) / np.sum(large | true))

    return _pair("segment", f"{images} images, 6 heads of 30 x 40 patches, 480 x 640 pixels", ours, plain, 1e-6)


def propagation(frames: int) -> Comparison:
    """Two objects through frames of 28 x 28 patches."""
    features = [torch.randn(28, 28, 384) for _ in range(frames)]
    first = F.one_hot(torch.randint(3, (28, 28)), 3).permute(2, 0, 1).float()

    def ours() -> Tensor:
        return torch.stack(list(video.propagate(features, first)))

    def plain() -> Tensor:
        return torch.stack(original_propagate(features, first))

    return _pair("video", f"{frames} frames of 28 x 28 patches, 384 wide, 2 objects", ours, plain, 1e-4)


def rankings(queries: int, database: int) -> Comparison:
    """Average precision of queries, each with 40 right images and 10 to pass over."""
    similarity = torch.randn(queries, database)
    chosen = torch.stack([torch.randperm(database)[:50] for _ in range(queries)])
    relevant, ignored = (torch.zeros(queries, database, dtype=torch.bool) for _ in range(2))
    relevant.scatter_(1, chosen[:, :40], True)
    ignored.scatter_(1, chosen[:, 40:], True)

    def plain() -> Tensor:
        return torch.tensor([one(row, ids) for row, ids in zip(similarity.numpy(), chosen.numpy(), strict=True)])

    def one(row: np.ndarray, ids: np.ndarray) -> float:
        order = np.argsort(-row, kind="stable")
        places, passed = (np.flatnonzero(np.isin(order, part)) for part in (ids[:40], ids[40:]))
        total = 0.0
        for found, place in enumerate(places):
            rank = place - np.sum(passed < place)
            before = 1.0 if rank == 0 else found / rank
            total += (before + (found + 1) / (rank + 1)) / 2 / len(places)
        return total

    def ours() -> Tensor:
        return retrieval.average_precision(similarity, relevant, ignored)

    return _pair("retrieval", f"{queries} queries, {database} images", ours, plain, 1e-6)


def copies(images: int) -> Comparison:
    """Pooled and whitened features from the tokens of images of 320 pixels."""
    tokens = torch.randn(images, 401, 384)

    def ours() -> Tensor:
        features = copy.copy_feature(tokens)
        white = copy.whitening(features)(features)
        return white @ white.T

    def plain() -> Tensor:
        rows = []
        for one in tokens:  # an image at a time
            pooled = one[1:].clamp(min=1e-6).permute(1, 0).pow(4).mean(dim=1).pow(0.25)
            rows.append(torch.cat((one[0], pooled)))
        x = torch.stack(rows).double().numpy()
        variance, vectors = np.linalg.eigh(x.T @ x / len(x))
        white = (x - x.mean(axis=0)) @ (vectors / np.sqrt(np.maximum(variance, 1e-5 * variance.max())))
        white = torch.from_numpy(white / np.linalg.norm(white, axis=1, keepdims=True)).float()
        return white @ white.T

    return _pair("copy", f"{images} images of 401 tokens, 384 wide", ours, plain, 1e-3)


def run(quick: bool = False, only: str = "") -> list[Row]:
    return run_all(comparisons(quick), quick=quick, only=only)


def test_speed(benchmark, contender):
    benchmark(contender)
