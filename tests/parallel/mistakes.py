"""Deliberate mistakes in the parallel code: the comparison of trajectories must notice each of them."""

from __future__ import annotations

import paddle

from alignment.parallel import autograd, collectives, topology
from alignment.ppo.models import lora
from alignment.training import engine


def make(name: str) -> None:
    """Break this process in one way."""
    {
        "mean_gradients": _average_gradients,
        "no_tied_sum": _forget_tied_sum,
        "no_copy_gradient": _forget_copy_gradient,
        "no_norm_sum": _forget_norm_sum,
        "same_slices": _draw_same_slices,
    }[name]()


def _average_gradients() -> None:
    """Gradients of data-parallel processes are averaged, not summed."""
    add = collectives.sum_tensors

    def average(tensors, group):
        tensors = list(tensors)
        add(tensors, group)
        if group == "data":
            for tensor in tensors:
                tensor.scale_(1 / topology.topology().data_size)

    engine.sum_tensors = average


def _forget_tied_sum() -> None:
    """The two ends of a pipeline keep their own gradients of the embedding that they share."""
    add = collectives.sum_tensors
    engine.sum_tensors = lambda tensors, group: None if group == "ends" else add(tensors, group)


def _forget_copy_gradient() -> None:
    """Gradients of what meets different columns on every process are not summed."""
    autograd.Copy.backward = staticmethod(lambda ctx, gradient: paddle.assign(gradient))


def _forget_norm_sum() -> None:
    """The gradient is clipped by the length of this process's part."""
    add = collectives.sum_tensors
    engine.sum_tensors = lambda tensors, group: None if group == "world" else add(tensors, group)


def _draw_same_slices() -> None:
    """Tensor-parallel processes take the same rows of an adapter's A."""
    lora.own_slice = lambda whole, parameter, placement: whole[: parameter.shape[0]]
