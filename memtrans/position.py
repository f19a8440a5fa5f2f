"""T5's relative position bias, counted from the query's true position.

Source: Raffel et al. 2020 (T5), section 2.1; Wu et al. 2022, section 4.2, use it for the local keys only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memtrans.checks import check_number, sizes
from memtrans.layers import device_of
from memtrans_kernels import checks
from memtrans_kernels.eager import kept


class T5RelativePositionBias(nn.Module):
    """A learned bias for each head and bucket of distances; exact up to num_buckets / 2, logarithmic beyond.

    Args:
        scale: factor of the learned values.
        num_buckets: buckets of distances, half of them for one distance each.
        max_distance: the distance from which on all is one bucket.
        heads: H.

    Raises:
        ValueError, TypeError: a size that is no integer, fewer than 2 buckets or 1 head, or a max_distance of at most
            num_buckets / 2, which leaves nothing to the logarithm.

    >>> bias = T5RelativePositionBias(scale=1.0, heads=4)
    >>> bias(3, 5).shape                                      # the 3 newest of 5 positions look at all of them
    torch.Size([1, 4, 3, 5])
    >>> bias.bucket(torch.tensor([0, 15, 16, 127, 128, 9999])).tolist()
    [0, 15, 16, 31, 31, 31]
    """

    def __init__(self, scale: float, num_buckets: int = 32, max_distance: int = 128, heads: int = 8) -> None:
        super().__init__()
        check_number("scale", scale)
        self.scale = scale
        self.num_buckets = checks.integer("num_buckets", num_buckets, low=2)
        self.max_distance = checks.integer("max_distance", max_distance, low=num_buckets // 2 + 1)
        heads = checks.integer("heads", heads, low=1)
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance (int64, at least 0)."""
        return _bucket(distance, self.num_buckets, self.max_distance)

    def table(self, free: int = 0, device: torch.device | None = None) -> Tensor:
        """Bias by distance (H, free + max_distance + 1); its last column holds for every larger distance.

        free: distances that cost nothing before the counting begins. 0 but for checkpoints trained with upstream, whose
        buckets ignore the XL cache. device: where the embedding takes them. Default: where its weights are.

        >>> T5RelativePositionBias(scale=1.0, heads=4).table().shape
        torch.Size([4, 129])
        """
        device = device_of(self) if device is None else device
        if type(self) is T5RelativePositionBias:  # on a GPU these are a dozen launches
            buckets = kept(_buckets, device, self.num_buckets, self.max_distance, free)
        else:
            buckets = self.bucket(_distances(device, self.max_distance, free))
        # contiguous, as kernels want it: else each layer would copy it, and again in its backward pass
        return self.relative_attention_bias(buckets).T.contiguous() * self.scale

    def forward(self, i: int, j: int, *, device: torch.device | str | None = None) -> Tensor:
        """Dense bias (1, H, i, j) of the i newest of j positions; 0 distance for keys in the future."""
        i, j = sizes(0, i=i, j=j)
        del device  # upstream's argument; the table lives where the weights live
        return expand_table(self.table(), i, j)[None]


def _bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, logarithmic)


def _distances(device: torch.device, max_distance: int, free: int) -> Tensor:
    """Of each column of a table, without those that cost nothing."""
    return (torch.arange(free + max_distance + 1, device=device) - free).clamp(min=0)


def _buckets(device: torch.device, num_buckets: int, max_distance: int, free: int) -> Tensor:
    """Of each column of a table."""
    return _bucket(_distances(device, max_distance, free), num_buckets, max_distance)


def expand_table(table: Tensor, length: int, local_keys: int) -> Tensor:
    """A bias by distance (H, distances) as a dense one (H, N, L); the segment's N tokens are the last of the L keys."""
    query_position = torch.arange(local_keys - length, local_keys, device=table.device)
    distance = query_position[:, None] - torch.arange(local_keys, device=table.device)
    return table[:, distance.clamp(0, table.shape[-1] - 1)]
