"""PKU-SafeRLHF: answer pairs marked for helpfulness and for safety (arXiv:2307.04657)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.raw import RawSample
from data.rows import RowDataset


class SafeRLHFDataset(RowDataset):
    """Rows: prompt, response_0, response_1, is_response_{0,1}_safe, better_response_id, safer_response_id."""

    COLUMNS = (
        "prompt",
        "response_0",
        "response_1",
        "is_response_0_safe",
        "is_response_1_safe",
        "better_response_id",
        "safer_response_id",
    )

    def to_sample(self, row: Mapping[str, Any]) -> RawSample:
        """Both responses of a row, with what people found better, safer and safe."""
        return RawSample(
            input=row["prompt"],
            answer=row["response_0"],
            other_answer=row["response_1"],
            better=int(row["better_response_id"]) == 0,
            safer=int(row["safer_response_id"]) == 0,
            is_safe=bool(row["is_response_0_safe"]),
            is_other_safe=bool(row["is_response_1_safe"]),
        )


class SafeRLHFTrain(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF/train"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF/train",)
    HUB, SPLIT = "PKU-Alignment/PKU-SafeRLHF", "train"


class SafeRLHFTest(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF/test"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF/test",)
    HUB, SPLIT = "PKU-Alignment/PKU-SafeRLHF", "test"


class SafeRLHF30KTrain(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF-30K/train"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF-30K/train",)
    HUB, SPLIT = "PKU-Alignment/PKU-SafeRLHF-30K", "train"


class SafeRLHF30KTest(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF-30K/test"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF-30K/test",)
    HUB, SPLIT = "PKU-Alignment/PKU-SafeRLHF-30K", "test"


class SafeRLHF10KTrain(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF-10K/train"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF-10K/train",)
    HUB, SPLIT = "PKU-Alignment/PKU-SafeRLHF-10K", "train"
