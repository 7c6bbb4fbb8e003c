"""A model part packed for the C++ kernels, with its cache of keys and values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np
import paddle

from alignment.native.build import load_library
from alignment.ppo.rollout.decoder import Decoder, DecoderLayer
from alignment.ppo.rollout.kernels import SampledTokens, TokenDraws
from alignment.ppo.rollout.native.structures import Layer, Scratch, Shape, Step, address, sample_tokens
from alignment.ppo.rollout.protocol import SamplingParameters
from alignment.runtime.bootstrap import compute_threads


class NativeKernels:
    """See alignment.ppo.rollout.kernels.Kernels; hidden states are NumPy arrays."""

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        places: int,
        longest: int,
        sum_parts: Callable[[paddle.Tensor], None] | None,
    ) -> None:
        self.decoder, self.sum_parts = decoder, sum_parts
        self.library, self.threads = load_library(), compute_threads()
        self.panel = self.library.panel_width()
        self.kept: list[np.ndarray | paddle.Tensor] = []  # what the structures point to
        self.cos, self.sin = decoder.rotary(longest)
        d = decoder
        self.shape = Shape(d.hidden, d.heads, d.groups, d.size, d.inner, d.epsilon, self.threads)
        self.layers = [self._layer(layer, places) for layer in d.layers]
        widths = (d.hidden, (d.heads + 2 * d.groups) * d.size, d.heads * d.size, d.inner)
        self.scratch = Scratch(*(self._keep(np.empty([rows, width], np.float32)) for width in widths))
        if d.head is not None:
            self.norm = self._of_tensor(d.norm)
            self.head = self._pack([d.head], transposed=d.head_is_transposed)

    # ---- a pass over the layers -------------------------------------------------------------------------------------

    def begin(self, positions: np.ndarray, slots: np.ndarray, tables: np.ndarray) -> None:
        """See Kernels.begin."""
        self.current = (positions, slots, tables)
        self.step = Step(
            len(positions), address(positions), address(slots), address(tables), tables.shape[1],
            address(self.cos), address(self.sin),
        )  # fmt: skip

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """See Kernels.embed."""
        return self.decoder.embed(paddle.to_tensor(tokens)).numpy()

    def attention(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """See Kernels.attention; adds in place."""

        def compute(into: np.ndarray) -> None:
            self.library.attention(
                ctypes.byref(self.shape), ctypes.byref(self.layers[layer]), ctypes.byref(self.step),
                ctypes.byref(self.scratch), c_void_p(address(hidden)), c_void_p(address(into)),
            )  # fmt: skip

        return self._add(hidden, compute)

    def mlp(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """See Kernels.mlp; adds in place."""

        def compute(into: np.ndarray) -> None:
            self.library.mlp(
                ctypes.byref(self.shape), ctypes.byref(self.layers[layer]), c_int64(len(hidden)),
                ctypes.byref(self.scratch), c_void_p(address(hidden)), c_void_p(address(into)),
            )  # fmt: skip

        return self._add(hidden, compute)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """See Kernels.logits."""
        columns = self.decoder.columns
        logits = np.empty([len(hidden), columns], np.float32)
        self.library.head(
            ctypes.byref(self.shape), c_void_p(self.norm), c_void_p(self.head), c_int64(len(hidden)),
            ctypes.byref(self.scratch), c_void_p(address(hidden)), c_void_p(address(logits)), c_int64(columns),
        )  # fmt: skip
        return logits

    # ---- arrays -----------------------------------------------------------------------------------------------------

    def concat(self, parts: list[np.ndarray]) -> np.ndarray:
        """See Kernels.concat."""
        return np.concatenate(parts)

    def from_tensor(self, tensor: paddle.Tensor) -> np.ndarray:
        """See Kernels.from_tensor."""
        return tensor.numpy()

    def to_tensor(self, array: np.ndarray) -> paddle.Tensor:
        """See Kernels.to_tensor."""
        return paddle.to_tensor(array)

    def sample(self, logits: np.ndarray, draws: TokenDraws, sampling: SamplingParameters) -> SampledTokens:
        """See Kernels.sample."""
        return sample_tokens(logits, draws, sampling)

    # ---- packing ----------------------------------------------------------------------------------------------------

    def _layer(self, layer: DecoderLayer, places: int) -> Layer:
        cache = [places, self.decoder.groups, self.decoder.size]
        bias = np.concatenate([part.numpy() for part in layer.qkv_bias]) if layer.qkv_bias else None
        return Layer(
            attention_norm=self._of_tensor(layer.attention_norm),
            qkv=self._pack(layer.qkv),
            qkv_bias=None if bias is None else self._keep(bias),
            output=self._pack([layer.output]),
            mlp_norm=self._of_tensor(layer.mlp_norm),
            gate_up=self._pack(layer.gate_up, interleaved=True),
            down=self._pack([layer.down]),
            keys=self._keep(np.empty(cache, np.float32)),  # fresh memory is taken as it is written
            values=self._keep(np.empty(cache, np.float32)),
        )

    def _pack(self, matrices: list[paddle.Tensor], transposed: bool = False, interleaved: bool = False) -> int:
        """Matrices [in, out] side by side, or gates and their partners lane by lane; returns the address."""
        shapes = [matrix.shape[::-1] if transposed else matrix.shape for matrix in matrices]
        depth, columns = shapes[0][0], sum(shape[1] for shape in shapes)
        packed = np.zeros([-(-columns // self.panel), depth, self.panel], np.float32)
        first = 0
        for number, (matrix, shape) in enumerate(zip(matrices, shapes, strict=True)):
            strides = (1, depth) if transposed else (shape[1], 1)
            self.library.pack(
                c_void_p(matrix.data_ptr()), c_int64(depth), c_int64(shape[1]), *map(c_int64, strides),
                c_int64(0 if interleaved else first), number + 1 if interleaved else 0,
                c_void_p(address(packed)), self.threads,
            )  # fmt: skip
            first += shape[1]
        return self._keep(packed)

    def _of_tensor(self, tensor: paddle.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _keep(self, array: np.ndarray) -> int:
        self.kept.append(array)
        return address(array)

    def _add(self, hidden: np.ndarray, compute: Callable[[np.ndarray], None]) -> np.ndarray:
        if self.sum_parts is None:
            compute(hidden)
            return hidden
        part = np.zeros_like(hidden)
        compute(part)
        tensor = paddle.to_tensor(part)
        self.sum_parts(tensor)
        hidden += tensor.numpy()
        return hidden
