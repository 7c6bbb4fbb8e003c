"""An optimizer step over micro-batches, in any layout: accumulate, sum over processes, clip, step."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle.distributed.fleet.utils.sequence_parallel_utils import is_sequence_parallel_parameter
from paddlenlp.trainer.trainer_utils import get_scheduler

from alignment.parallel.collectives import sum_tensors
from alignment.parallel.pipeline import MicroBatch
from alignment.parallel.sharding import Home
from alignment.parallel.topology import topology
from alignment.ppo.models.placement import is_copy, is_tied, merged, own_slice, split_axis
from alignment.ppo.models.policy import passes_of
from alignment.ppo.models.weights import WeightFiles
from alignment.runtime.bootstrap import return_freed_memory
from alignment.training.nonfinite import Guard, describe_bad_step

NORM_EPSILON = 1e-6  # as in paddle.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule, in PaddleNLP's names."""

    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: int

    @classmethod
    def from_arguments(cls, args: object, prefix: str = "") -> OptimizerSettings:
        """Read the settings from a stage's arguments; ``prefix + name`` wins over ``name`` where it is set."""
        values = {}
        for name in cls.__dataclass_fields__:
            override = getattr(args, prefix + name, None)
            values[name] = override if override is not None else getattr(args, name)
        if prefix and getattr(args, prefix + "warmup_ratio", None) is not None:
            values["warmup_steps"] = 0  # PaddleNLP lets steps win over the ratio: the critic's own ratio must count
        return cls(**values)


class TrainingEngine:
    """One model with its optimizer and schedule.

    The losses of micro-batches must already be divided by their denominator over the whole optimizer step (all
    micro-batches, all processes): then any accumulation and any layout give the same step.

    Args:
        model: this process's part; its parameters with ``stop_gradient`` False are trained.
        settings: optimizer and schedule.
        total_steps: optimizer steps of the whole run, for the schedule.
        name: for messages, e.g. "actor".
        guard: what becomes of a step that is not finite; None: the run stops.

    Attributes:
        learning_rate: of the latest step; peak_learning_rate: the one that was asked for.
        seen: micro-batches since the last step or ``discard``, and idle rounds, as ``accumulate`` was given them.
        optimizer_home: where ``optimizer_tensors`` are between uses, as Shards.home.
        spares_memory: give memory that a step has freed back to the system, which costs some time.
    """

    def __init__(
        self,
        model: paddle.nn.Layer,
        settings: OptimizerSettings,
        total_steps: int,
        name: str,
        guard: Guard | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.guard = guard or Guard()
        self.seen: list[tuple[Sequence[MicroBatch], int]] = []
        self.max_grad_norm = settings.max_grad_norm
        self.names = {p.name: key for key, p in model.named_parameters() if not p.stop_gradient}
        self.pipeline = passes_of(model)
        self.shards = self.pipeline.shards
        self.parameters = self.shards.trained
        self.copies = {p.name for p in self.parameters if is_copy(self.names[p.name], model)}
        warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
        self.scheduler = get_scheduler(
            settings.lr_scheduler_type,
            learning_rate=settings.learning_rate,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
        )
        self.learning_rate, self.peak_learning_rate = self.scheduler.get_lr(), settings.learning_rate
        decayed = {name for name, key in self.names.items() if "norm" not in key and not key.endswith("bias")}
        self.optimizer = None if not self.shards.own else paddle.optimizer.AdamW(
            learning_rate=self.scheduler,
            beta1=settings.adam_beta1,
            beta2=settings.adam_beta2,
            epsilon=settings.adam_epsilon,
            parameters=self.shards.own,
            weight_decay=settings.weight_decay,
            apply_decay_param_fun=decayed.__contains__,
            multi_precision=True,
        )
        self.optimizer_home: Home = nullcontext
        self.spares_memory = False

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Around ``accumulate`` and ``step``: weights and optimizer are on the device, and no gradient outlasts it."""
        with self.shards.home(True), self.optimizer_home(True):
            try:
                yield
            finally:
                self.discard()

    def accumulate(self, micro_batches: Sequence[MicroBatch], idle_rounds: int = 0) -> list[Any]:
        """Add the gradients of micro-batches; returns their reports, on every stage of the model.

        Args: idle_rounds: how many fewer these are than another process has.
        """
        self.seen.append((micro_batches, idle_rounds))
        if self.shards.stage < 2:
            return self.pipeline.forward_backward(micro_batches)
        reports = []
        for micro in micro_batches:  # no pipeline: see alignment.parallel.layout
            reports += self.pipeline.forward_backward([micro])
            self.shards.collect_gradients()
        for _ in range(idle_rounds):
            self.shards.sit_out()
        return reports

    @paddle.no_grad()
    def step(self, loss: float = 0.0) -> dict[str, float]:
        """Sum gradients over processes, clip, update. Returns {"grad_norm", "lr"} of this step.

        Without a finite loss and gradient, weights and moments stay as they are on all processes; the schedule goes
        on. Where such steps may be left out, {"skipped_steps": 0 or 1} comes too.

        Args: loss: of the whole step, over all processes.
        Raises: RunError if the loss or the gradient is not finite and the guard does not let that pass.
        """
        gradients = self._sum_gradients()
        norm = self._norm(gradients)
        if math.isfinite(norm) and math.isfinite(loss):
            self._update(gradients, norm)
            self.guard.accept()
            skipped = 0
        else:
            self.guard.refuse(describe_bad_step(self, loss, norm))
            self.discard()
            skipped = 1
        self.advance_schedule()
        return {"grad_norm": norm, "lr": self.learning_rate, **self.guard.count(skipped)}

    def advance_schedule(self) -> None:
        """Go on to the learning rate of the next step."""
        self.learning_rate = self.scheduler.get_lr()
        self.scheduler.step()

    def _update(self, gradients: dict[str, paddle.Tensor], norm: float) -> None:
        """Clip the whole batch's gradients, whose length is ``norm``, and let the optimizer use them."""
        if 0 < self.max_grad_norm < norm + NORM_EPSILON:
            for gradient in gradients.values():
                gradient.scale_(self.max_grad_norm / (norm + NORM_EPSILON))
        if self.optimizer:
            self.optimizer.step()
        self.discard()
        if self.spares_memory:
            return_freed_memory()
        self.shards.share_updates()

    def discard(self) -> None:
        """Forget the gradients added since the last step."""
        self.seen.clear()
        self.shards.sums.clear()
        for parameter in self.parameters:
            parameter.clear_gradient(False)

    def _sum_gradients(self) -> dict[str, paddle.Tensor]:
        """The whole batch's gradients by parameter, in place: of all here, or from stage 2 on of our own."""
        if self.shards.stage < 2:
            parameters, group = self.parameters, "data"
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = paddle.zeros_like(parameter)
        else:
            parameters, group = self.shards.own, "replica"
            for parameter in parameters:
                sums = self.shards.sums.get(parameter.name)
                parameter.grad = paddle.zeros_like(parameter) if sums is None else sums.astype(parameter.dtype)
        # A norm's weight has seen only our tokens under sequence parallelism; a tied embedding is at both ends.
        sum_tensors([p.grad for p in parameters if is_sequence_parallel_parameter(p)], "tensor")
        tied = [p.grad for p in parameters if is_tied(self.names[p.name], self.model)]
        sum_tensors(tied, "ends")
        gradients = {p.name: p.grad for p in parameters}
        sum_tensors(gradients.values(), group)
        return gradients

    def _norm(self, gradients: dict[str, paddle.Tensor]) -> float:
        """Length of the gradient of the whole model: every parameter's squares are counted on one process."""
        place = topology()
        counted = place.layout.sharding_stage >= 2 or place.sharding_rank == 0
        squares = paddle.zeros([1], dtype="float32")
        for parameter in self.parameters:
            if parameter.name in gradients and counted and self._counts(parameter):
                squares += gradients[parameter.name].astype("float32").square().sum()
        sum_tensors([squares], "world")
        return float(squares) ** 0.5

    def _counts(self, parameter: paddle.Tensor) -> bool:
        place = topology()
        whole_elsewhere = split_axis(parameter) is None and place.tensor_rank > 0
        first_replica = place.data_rank < place.layout.sharding
        return first_replica and not whole_elsewhere and parameter.name not in self.copies

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict]:
        """The owned optimizer tensors, merged over tensor parallelism, by structured names; the schedule's numbers.

        Every process of the job calls it. Its own part of a tied embedding's copy is left out.
        """
        with self.optimizer_home(False):
            return self._merged_state(), self.scheduler.state_dict()

    def optimizer_tensors(self) -> list[paddle.Tensor]:
        """Moments, powers of beta and float32 weights; none before the first step or ``load_state_dict``."""
        state = self.optimizer.state_dict()
        state.pop("LR_Scheduler", None)
        return [*state.pop("master_weights", {}).values(), *state.values()]

    def _merged_state(self) -> dict[str, np.ndarray]:
        state = self.optimizer.state_dict() if self.optimizer else {}
        state.pop("LR_Scheduler", None)
        masters = state.pop("master_weights", {})
        tensors = {self._structured(key): value for key, value in state.items()}
        tensors |= {f"{self.names[key]}/master": value for key, value in masters.items()}
        by_name = {self.names[parameter.name]: parameter for parameter in self.shards.own}
        whole = {}
        for key in sorted(tensors):
            name, _, kind = key.rpartition("/")
            if by_name[name].name not in self.copies:
                whole[key] = merged(tensors[key], _axis(kind, by_name[name])).numpy()
        return whole

    def load_state_dict(self, files: WeightFiles, schedule: dict) -> None:
        """Take back what ``state_dict`` gave, in whatever layout.

        Raises: ValueError, with nothing changed, if it is not the state of the parameters that are trained here.
        """
        stored = self._check_state(files, schedule)
        with self.optimizer_home(True):
            if self.optimizer:
                self.optimizer.set_state_dict(self._read_state(files, stored) | {"LR_Scheduler": schedule})
            if stored and self.optimizer:  # else Adam holds both the state and a copy of it until its first step
                block = paddle.static.default_main_program().global_block()
                self.optimizer._create_accumulators(block, self.shards.own)
        self.scheduler.set_state_dict(schedule)

    def _read_state(self, files: WeightFiles, stored: dict[str, list[str]]) -> dict:
        """What is stored of the parameters that are owned here, under Paddle's names."""
        state: dict = {"master_weights": {}}
        for parameter in self.shards.own if stored else ():
            for kind in stored[self.names[parameter.name]]:
                whole = files.read(f"{self.names[parameter.name]}/{kind}")
                part = whole if _axis(kind, parameter) is None else own_slice(whole, parameter, self.model.placement)
                tensor = part.to(paddle.get_device())  # files are read on the CPU
                if kind == "master":
                    tensor.name = f"{parameter.name}_fp32_master_0"
                    state["master_weights"][parameter.name] = tensor
                else:
                    state[f"{parameter.name}_{kind}"] = tensor
        return state

    def _check_state(self, files: WeightFiles, schedule: dict) -> dict[str, list[str]]:
        """What is stored of the parameters here: their names with the kinds of tensors."""
        if not isinstance(schedule, dict) or schedule.keys() != self.scheduler.state_dict().keys():
            raise ValueError("no state of the learning-rate schedule")
        stored: dict[str, list[str]] = {}
        for key in files.names():
            name, _, kind = key.rpartition("/")
            if self.model.placement.holds(name, self.model.config.num_hidden_layers, self.model.ties_ends):
                stored.setdefault(name, []).append(kind)
        here = {self.names[parameter.name]: parameter for parameter in self.parameters}
        others = here.keys() ^ stored.keys()
        if files.names() and others:  # Paddle takes no optimizer state before the first step
            raise ValueError(f"parameters trained then and now differ: {min(others)}")
        for name, kinds in stored.items():
            for kind in kinds:
                self._check_shape(f"{name}/{kind}", files.shape(f"{name}/{kind}"), here[name])
        return stored

    def _check_shape(self, key: str, shape: list[int], parameter: paddle.Tensor) -> None:
        expected, axis = list(parameter.shape), split_axis(parameter)
        if axis is not None:
            expected[axis] *= self.model.placement.tensor
        if "_pow_acc" not in key and shape != expected:
            raise ValueError(f"{key} has shape {shape}, its parameter {expected}")

    def _structured(self, key: str) -> str:
        """``linear_3.w_0_moment1_0`` -> ``llama.layers.0.mlp.up_proj.weight/moment1_0``."""
        name = max((name for name in self.names if key.startswith(name + "_")), key=len)
        return f"{self.names[name]}/{key[len(name) + 1 :]}"


def _axis(kind: str, parameter: paddle.Tensor) -> int | None:
    """The axis along which an optimizer tensor is divided: its parameter's, but the powers of beta are one number."""
    return None if "_pow_acc" in kind else split_axis(parameter)
