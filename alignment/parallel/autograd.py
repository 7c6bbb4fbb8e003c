"""Collectives that a gradient flows through: what is forward a copy is backward a sum, and so on.

Members of a group compute the same loss from different columns of the same matrices (tensor parallelism).
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer


class Copy(PyLayer):
    """x as it is; backward the sum of the members' gradients, for each uses x for columns of its own."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any, *_: Any) -> paddle.Tensor:
        ctx.group = group
        return paddle.assign(x)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return _summed(gradient, ctx.group)


class Sum(PyLayer):
    """The sum of the members' x; backward the gradient as it is, for each has all of it."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any, *_: Any) -> paddle.Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return paddle.assign(gradient)


class Concat(PyLayer):
    """The members' parts side by side along the last axis; backward the own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any) -> paddle.Tensor:
        ctx.group = group
        return concat(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return _own_part(gradient, ctx.group)


class Split(PyLayer):
    """The own part along the last axis; backward the members' gradients side by side."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any) -> paddle.Tensor:
        ctx.group = group
        return _own_part(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return concat(gradient, ctx.group)


def concat(x: paddle.Tensor, group: Any, axis: int = -1) -> paddle.Tensor:
    """The members' parts side by side, without a gradient."""
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return paddle.concat(parts, axis=axis)


def _summed(x: paddle.Tensor, group: Any) -> paddle.Tensor:
    x = paddle.assign(x)
    dist.all_reduce(x, group=group)
    return x


def _own_part(x: paddle.Tensor, group: Any) -> paddle.Tensor:
    return paddle.assign(paddle.split(x, group.nranks, axis=-1)[group.rank])
