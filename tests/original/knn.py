"""The k-NN vote as it was published: a hundredth of the queries at a time against the whole bank, for one k after the
other, with a one-hot row of all classes for every neighbour."""

from __future__ import annotations

import torch


def knn(bank, bank_labels, queries, query_labels, k, temperature, num_classes=1000):
    """Unit features `[N, dim]`, `[M, dim]` -> (top-1, top-5), shares of M; M is at least 100."""
    chunk = len(queries) // 100
    first = five = 0
    columns = bank.T
    for start in range(0, len(queries), chunk):
        features, targets = queries[start : start + chunk], query_labels[start : start + chunk]
        similarity = features @ columns
        values, index = similarity.topk(k, dim=1)
        neighbours = bank_labels[None].expand(len(features), -1).gather(1, index)
        one_hot = torch.zeros(len(features) * k, num_classes).scatter_(1, neighbours.reshape(-1, 1), 1)
        weights = (values / temperature).exp()
        votes = (one_hot.view(len(features), k, num_classes) * weights[:, :, None]).sum(dim=1)
        order = votes.sort(dim=1, descending=True).indices
        hits = order == targets[:, None]
        first += hits[:, :1].sum().item()
        five += hits[:, :5].sum().item()
    return first / len(queries), five / len(queries)
