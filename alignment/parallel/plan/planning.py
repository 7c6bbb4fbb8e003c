"""The plan of a run: does it fit, and if not, what would help?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from alignment.parallel.layout import STAGES, Layout, resolve_layout
from alignment.parallel.plan.activations import precision_of
from alignment.parallel.plan.arguments import Sizes
from alignment.parallel.plan.memory import Memory, memory_of
from alignment.parallel.plan.models import Model, models_of
from alignment.parallel.plan.setting import Setting
from alignment.parallel.plan.shapes import ModelShape
from alignment.parallel.plan.traffic import Traffic, traffic_of
from alignment.runtime.faults import UsageError

GB = 1e9
_MOST_REMEDIES = 3


@dataclass(frozen=True)
class Remedy:
    """Arguments that change the plan, and the most memory that a rank then needs, in GB."""

    changes: dict[str, Any]
    needed_gb: float

    @property
    def options(self) -> str:
        """As they are written on the command line."""
        return " ".join(f"--{name} {_written(value)}" for name, value in self.changes.items())


def _written(value: Any) -> str:
    return "null" if value is None else "true" if value is True else str(value)


@dataclass(frozen=True)
class Plan:
    """What a run needs; estimates of tensors alone.

    Attributes:
        stage: one of alignment.parallel.plan.arguments.STAGES.
        processes: how many, one device each; device_memory_gb: what a device has.
        layout, sizes, models: what was planned for.
        memory: bytes on a rank, for every phase and pipeline stage.
        traffic: bytes a rank sends, for every pipeline stage.
        remedies: if it does not fit, changes after which it does, mild ones first; or else what helps most.
    """

    stage: str
    processes: int
    device_memory_gb: float
    layout: Layout
    sizes: Sizes
    models: tuple[Model, ...]
    memory: tuple[Memory, ...]
    traffic: tuple[Traffic, ...]
    remedies: tuple[Remedy, ...] = ()

    @property
    def largest(self) -> Memory:
        """The phase and pipeline stage that need most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def needed_gb(self) -> float:
        """Memory of ``largest``, in GB."""
        return self.largest.total / GB

    @property
    def fits(self) -> bool:
        return self.needed_gb <= self.device_memory_gb

    def verdict(self) -> str:
        """One line: how much is needed where, and what would help if that is too much."""
        where = f" on pipeline stage {self.largest.stage}" if self.layout.pipeline > 1 else ""
        need = f"{self.largest.phase}{where} needs {self.needed_gb:.1f} GB of a device's {self.device_memory_gb:g}"
        if self.fits:
            return f"fits: {need}, the most of all phases"
        options = "; ".join(f"{remedy.options} ({remedy.needed_gb:.1f} GB)" for remedy in self.remedies)
        if not options:
            return f"does not fit: {need}; use more processes or a smaller model"
        if self.remedies[0].needed_gb > self.device_memory_gb:
            return f"does not fit: {need}; what helps most, but not enough: {options}; use more processes as well"
        return f"does not fit: {need}; enough would be {options}"


def plan(
    stage: str, sizes: Sizes, shapes: Mapping[str, ModelShape], processes: int, device_memory_gb: float = 80.0
) -> Plan:
    """The plan of a stage; nothing is loaded and no process is joined.

    Args:
        stage: one of alignment.parallel.plan.arguments.STAGES.
        sizes: of the stage's arguments; ``Sizes.of`` takes them from all arguments by name.
        shapes: of the models, by the argument that names them; ``find_shapes`` reads them.
        processes: of the job, one device each.
        device_memory_gb: of one device, in GB of 1e9 bytes.
    Raises: UsageError if layout, processes and models do not go together.
    """
    found = _estimate(stage, sizes, shapes, processes, device_memory_gb)
    return found if found.fits else replace(found, remedies=_remedies(found, shapes))


def _estimate(
    stage: str, sizes: Sizes, shapes: Mapping[str, ModelShape], processes: int, device_memory_gb: float
) -> Plan:
    layout = resolve_layout(asdict(sizes), processes)
    models = models_of(stage, sizes, shapes, layout)
    setting = Setting(stage, sizes, layout, precision_of(sizes.bf16, sizes.fp16_opt_level), models)
    memory, traffic = memory_of(setting), traffic_of(setting)
    return Plan(stage, processes, device_memory_gb, layout, sizes, models, memory, traffic)


def _remedies(found: Plan, shapes: Mapping[str, ModelShape]) -> tuple[Remedy, ...]:
    """Single changes that are enough; or else the strongest, and what is enough after it."""
    tried = [remedy for ladder in _ladders(found) if (remedy := _climb(found, ladder, shapes))]
    enough = [remedy for remedy in tried if remedy.needed_gb <= found.device_memory_gb]
    if enough:
        return tuple(enough[:_MOST_REMEDIES])
    best = min(tried, key=lambda remedy: remedy.needed_gb, default=None)
    if best is None or best.needed_gb >= found.needed_gb:
        return ()
    after = _changed(found, best.changes, shapes)
    more = [replace(remedy, changes=best.changes | remedy.changes) for remedy in _remedies(after, shapes)]
    return tuple(more[:1]) or (best,)


def _climb(found: Plan, ladder: list[dict[str, Any]], shapes: Mapping[str, ModelShape]) -> Remedy | None:
    """The first rung that fits, else the last that is possible."""
    remedy = None
    for changes in ladder:
        try:
            needed_gb = _changed(found, changes, shapes).needed_gb
        except UsageError:
            continue
        remedy = Remedy(changes, needed_gb)
        if needed_gb <= found.device_memory_gb:
            break
    return remedy


def _changed(found: Plan, changes: Mapping[str, Any], shapes: Mapping[str, ModelShape]) -> Plan:
    sizes = replace(found.sizes, **changes)
    return _estimate(found.stage, sizes, shapes, found.processes, found.device_memory_gb)


def _ladders(found: Plan) -> Iterator[list[dict[str, Any]]]:
    """Changes of one kind, from mild to strong."""
    sizes, layout = found.sizes, found.layout
    if not sizes.recompute or sizes.critic_recompute is False:
        both = {} if sizes.critic_recompute is None else {"critic_recompute": True}
        yield [{"recompute": True, **both}]
    if not (sizes.bf16 and sizes.fp16_opt_level == "O2"):
        yield [{"bf16": True, "fp16_opt_level": "O2"}]
    rows, steps = sizes.per_device_train_batch_size, sizes.gradient_accumulation_steps
    yield [
        {"per_device_train_batch_size": few, "gradient_accumulation_steps": rows * steps // few}
        for few in _halves(rows)
        if rows * steps % few == 0
    ]
    yield [{"per_device_eval_batch_size": few} for few in _halves(sizes.per_device_eval_batch_size)]
    if sizes.eval_mode:
        yield [{"eval_mode": mode} for mode in ("tensor_parallel", None) if mode != sizes.eval_mode]
    left = layout.data * layout.sharding
    if left > 1:
        done = layout.sharding_stage if layout.sharding == left else 0
        yield [{"sharding": name, "sharding_parallel_degree": left} for name, stage in STAGES.items() if stage > done]
    for kind, degree in (("tensor", layout.tensor), ("pipeline", layout.pipeline)):
        rest = {"sharding_parallel_degree": -1} if layout.sharding_stage else {}
        yield [{f"{kind}_parallel_degree": degree * 2**n, **rest} for n in range(1, left.bit_length())]


def _halves(count: int) -> list[int]:
    """count / 2, count / 4, ... down to 1."""
    return [count >> n for n in range(1, count.bit_length())]
