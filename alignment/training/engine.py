"""An optimizer step over micro-batches: accumulate, sum over ranks, clip, step."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle
from paddlenlp.trainer.trainer_utils import get_scheduler

from alignment.parallel.data_parallel import sum_gradients
from alignment.runtime.faults import RunError


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

    The loss passed to ``backward`` must already be divided by its denominator over the whole optimizer step (all
    micro-batches, all ranks): then any accumulation and any number of ranks give the same step.

    Args:
        model: its parameters with ``stop_gradient`` False are trained.
        settings: optimizer and schedule.
        total_steps: optimizer steps of the whole run, for the schedule.
        name: for messages, e.g. "actor".
    """

    def __init__(self, model: paddle.nn.Layer, settings: OptimizerSettings, total_steps: int, name: str) -> None:
        self.model = model
        self.name = name
        self.max_grad_norm = settings.max_grad_norm
        self.names = {p.name: key for key, p in model.named_parameters() if not p.stop_gradient}
        self.parameters = [p for p in model.parameters() if not p.stop_gradient]
        warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
        self.scheduler = get_scheduler(
            settings.lr_scheduler_type,
            learning_rate=settings.learning_rate,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
        )
        self.learning_rate = self.scheduler.get_lr()  # of the latest step
        decayed = {name for name, key in self.names.items() if "norm" not in key and not key.endswith("bias")}
        self.optimizer = paddle.optimizer.AdamW(
            learning_rate=self.scheduler,
            beta1=settings.adam_beta1,
            beta2=settings.adam_beta2,
            epsilon=settings.adam_epsilon,
            parameters=self.parameters,
            weight_decay=settings.weight_decay,
            apply_decay_param_fun=decayed.__contains__,
            multi_precision=True,
        )

    def backward(self, loss: paddle.Tensor) -> None:
        """Add this micro-batch's gradients."""
        if not loss.stop_gradient:
            loss.backward()

    def step(self) -> dict[str, float]:
        """Sum gradients over ranks, clip, update. Returns {"grad_norm", "lr"} of this step.

        Raises: RunError if the gradient is not finite; the weights are then untouched.
        """
        sum_gradients(self.parameters)
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = float(paddle.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise RunError(f"the gradient of the {self.name} is not finite ({norm}): lower the learning rate")
        self.optimizer.step()
        self.optimizer.clear_grad()
        self.learning_rate = self.optimizer.get_lr()
        self.scheduler.step()
        return {"grad_norm": norm, "lr": self.learning_rate}

    def discard(self) -> None:
        """Forget the gradients added since the last step."""
        self.optimizer.clear_grad()

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict]:
        """Optimizer tensors under their parameters' structured names, and the schedule's plain numbers."""
        state = self.optimizer.state_dict()
        schedule = state.pop("LR_Scheduler")
        masters = state.pop("master_weights", {})
        tensors = {self._structured(key): value for key, value in state.items()}
        tensors |= {f"{self.names[key]}/master": value for key, value in masters.items()}
        return {key: value.numpy() for key, value in tensors.items()}, schedule

    def load_state_dict(self, tensors: dict[str, np.ndarray], schedule: dict) -> None:
        """Take back what ``state_dict`` gave.

        Raises: ValueError, with nothing changed, if it is not the state of the parameters that are trained here.
        """
        self._check_state(tensors, schedule)
        generated = {key: name for name, key in self.names.items()}
        state: dict = {"LR_Scheduler": schedule, "master_weights": {}}
        for key, value in tensors.items():
            parameter, kind = key.rsplit("/", 1)
            tensor = paddle.to_tensor(value)
            if kind == "master":
                tensor.name = f"{generated[parameter]}_fp32_master_0"
                state["master_weights"][generated[parameter]] = tensor
            else:
                state[f"{generated[parameter]}_{kind}"] = tensor
        self.optimizer.set_state_dict(state)

    def _check_state(self, tensors: dict[str, np.ndarray], schedule: dict) -> None:
        if not isinstance(schedule, dict) or schedule.keys() != self.scheduler.state_dict().keys():
            raise ValueError("no state of the learning-rate schedule")
        shapes = {self.names[parameter.name]: list(parameter.shape) for parameter in self.parameters}
        others = shapes.keys() ^ {key.rpartition("/")[0] for key in tensors}
        if tensors and others:  # Paddle takes no optimizer state before the first step
            raise ValueError(f"parameters trained then and now differ: {min(others)}")
        for key, value in tensors.items():
            parameter, _, kind = key.rpartition("/")
            if "_pow_acc" not in kind and list(value.shape) != shapes[parameter]:
                raise ValueError(f"{key} has shape {list(value.shape)}, its parameter {shapes[parameter]}")

    def _structured(self, key: str) -> str:
        """``linear_3.w_0_moment1_0`` -> ``llama.layers.0.mlp.up_proj.weight/moment1_0``."""
        name = max((name for name in self.names if key.startswith(name + "_")), key=len)
        return f"{self.names[name]}/{key[len(name) + 1 :]}"
