"""Label propagation as it was published, one thing after the other: four nested loops over patches and their
neighbours, a dense affinity to every earlier frame, everything but the largest set to zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def neighbourhood(h: int, w: int, radius: int) -> torch.Tensor:
    """`[h * w, h * w]`, 1 where two patches are within the radius in both directions."""
    mask = torch.zeros(h, w, h, w)
    for i in range(h):
        for j in range(w):
            for p in range(i - radius, i + radius + 1):
                for q in range(j - radius, j + radius + 1):
                    if 0 <= p < h and 0 <= q < w:
                        mask[i, j, p, q] = 1
    return mask.reshape(h * w, h * w)


def propagate(features, first, last_frames=7, radius=12, topk=5, temperature=0.1):
    """As `dino_fast.eval.video.propagate`."""
    h, w, _ = features[0].shape
    mask = neighbourhood(h, w, radius) if radius else None
    flat = [F.normalize(frame.reshape(h * w, -1), dim=1) for frame in features]
    start, queue, outputs = (flat[0], first), [], []
    for target in flat[1:]:
        used = [start, *queue]
        sources = torch.stack([frame.T for frame, _ in used])  # [n, dim, h * w]
        affinity = torch.exp(torch.bmm(target[None].expand(len(used), -1, -1), sources) / temperature)
        if mask is not None:
            affinity = affinity * mask
        affinity = affinity.transpose(2, 1).reshape(-1, h * w)  # rows are earlier patches, columns this frame's
        lowest = affinity.topk(topk, dim=0).values.min(dim=0).values
        affinity[affinity < lowest] = 0
        affinity = affinity / affinity.sum(dim=0, keepdim=True)
        masks = torch.cat([m.reshape(len(m), -1) for _, m in used], dim=1)  # [classes, n * h * w]
        result = torch.mm(masks, affinity).reshape(-1, h, w)
        if len(queue) == last_frames and queue:
            queue.pop(0)
        if last_frames:
            queue.append((target, result))
        outputs.append(result)
    return outputs
