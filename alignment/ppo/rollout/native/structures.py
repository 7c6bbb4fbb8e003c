"""The C++ kernels' structures, and the call that draws tokens; kernels.cpp and its headers are the other side."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p

import numpy as np

from alignment.native.build import load_library
from alignment.ppo.rollout.kernels import SampledTokens, TokenDraws
from alignment.ppo.rollout.protocol import BROKEN, SamplingParameters
from alignment.runtime.bootstrap import compute_threads


class Shape(ctypes.Structure):
    """Sizes of a model part."""

    _fields_ = [(name, c_int64) for name in ("hidden", "heads", "groups", "size", "inner")] + [
        ("epsilon", c_float),
        ("threads", c_int32),
    ]


class Layer(ctypes.Structure):
    """Addresses of packed weights and of a layer's keys and values."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "attention_norm", "qkv", "qkv_bias", "output", "mlp_norm", "gate_up", "down", "keys", "values"
        )
    ]  # fmt: skip


class Step(ctypes.Structure):
    """The rows of a pass."""

    _fields_ = [("rows", c_int64), ("positions", c_void_p), ("slots", c_void_p), ("tables", c_void_p)] + [
        ("table_width", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
    ]


class Scratch(ctypes.Structure):
    """Room for intermediate results."""

    _fields_ = [(name, c_void_p) for name in ("normed", "qkv", "mixed", "inner")]


class _Sampling(ctypes.Structure):
    """How tokens are drawn."""

    _fields_ = [("vocabulary", c_int64), ("temperature", c_double), ("top_k", c_int64), ("top_p", c_double)] + [
        ("penalty", c_double),
        ("ends", c_void_p),
        ("end_count", c_int64),
    ]


def sample_tokens(logits: np.ndarray, draws: TokenDraws, sampling: SamplingParameters) -> SampledTokens:
    """Kernels.sample: logits float32 [rows, V]."""
    ends = np.asarray([token for token in sampling.eos_token_ids if token < logits.shape[1]], np.int64)
    how = _Sampling(
        logits.shape[1], sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty,
        address(ends), len(ends),
    )  # fmt: skip
    count = len(draws.rows)
    tokens, described = np.empty([count], np.int64), np.empty([2, count], np.float32)
    seen = None if draws.seen is None else address(draws.seen)
    forbids_end = draws.forbids_end.astype(np.uint8)
    columns = (draws.rows, draws.slots, draws.uniforms)
    load_library().sample(
        ctypes.byref(how), c_void_p(address(logits)), c_int64(count), *(c_void_p(address(c)) for c in columns),
        c_void_p(seen), *(c_void_p(address(c)) for c in (forbids_end, tokens, *described)), compute_threads(),
    )  # fmt: skip
    tokens[~np.isfinite(described).all(0)] = BROKEN
    return SampledTokens(tokens, *described)


def address(array: np.ndarray) -> int:
    """Of an array without gaps."""
    assert array.flags.c_contiguous
    return array.ctypes.data
