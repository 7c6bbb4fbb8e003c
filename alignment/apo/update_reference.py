"""What the initial policy says about the answers: measured once, so that no second model is in memory."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from alignment.apo.answers import answer_log_probs, longest, pack_answers
from alignment.apo.update_data import ReferencedDataset
from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch, Pipeline
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process
from alignment.training.batches import own_micro_batches

REFERENCE_FILE = "reference.npz"
ITEMS_AT_ONCE = 4096  # on the device; all processes exchange their results after so many


def measure_reference(policy: Pipeline, dataset: ReferencedDataset, batch_size: int) -> None:
    """Set ``dataset.reference`` to what the policy says now, every process working on its share of the items.

    Args: batch_size: items of a forward pass.
    """
    lengths, collate = [longest(item) for item in dataset], dataset.get_collator()

    def micro_batch(places: list[int]) -> MicroBatch:
        packed, _ = pack_answers(collate([dataset[place] for place in places]))

        def finish(hidden: object) -> tuple[None, np.ndarray]:
            return None, answer_log_probs(policy.model, hidden, packed).numpy()

        return MicroBatch(packed.input_ids, packed.attention_mask, finish)

    parts: dict[int, np.ndarray] = {}
    order = np.argsort(lengths, kind="stable").tolist()
    for start in range(0, len(order), ITEMS_AT_ONCE):
        shares = own_micro_batches(order[start : start + ITEMS_AT_ONCE], lengths.__getitem__, batch_size)
        measured = policy.forward([micro_batch(places) for places in shares])
        for places, log_probs in chain(*gather_objects(list(zip(shares, measured, strict=True)))):
            ends = np.cumsum([len(dataset[place]["input_ids"]) for place in places])[:-1]
            parts |= zip(places, np.split(log_probs, ends), strict=True)
    dataset.reference = np.concatenate([parts[place] for place in range(len(dataset))])


def save_reference(files: Files, datasets: dict[str, ReferencedDataset]) -> None:
    """Add what was measured to a checkpoint, which knows the data sets themselves. Every process calls it."""
    if is_main_process():
        files.add_arrays(REFERENCE_FILE, {key: dataset.reference for key, dataset in datasets.items()})


def load_reference(checkpoint: Path, datasets: dict[str, ReferencedDataset]) -> None:
    """Take it back. Raises UsageError if the file is missing or damaged, or has nothing of a data set."""
    try:
        with np.load(checkpoint / REFERENCE_FILE, allow_pickle=False) as stored:
            for key, dataset in datasets.items():
                dataset.reference = stored[key]
    except (OSError, ValueError, KeyError, BadZipFile) as fault:
        raise UsageError(f"{checkpoint}: cannot resume from it: {REFERENCE_FILE}: {fault}") from fault
