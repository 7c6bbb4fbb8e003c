"""Preference, prompt and supervised data: raw data sets by name, mixed, tokenised and batched. NumPy only."""

from data import builtin
from data.comparison import ComparisonCollator, ComparisonDataset
from data.errors import DataError
from data.modules import load_dataset_modules
from data.preference import (
    PreferenceCollator,
    PreferenceDataset,
    SafetyPreferenceCollator,
    SafetyPreferenceDataset,
)
from data.prompt_only import PromptOnlyCollator, PromptOnlyDataset
from data.raw import RawDataset, RawSample
from data.spec import DatasetSpec, parse_specs
from data.supervised import SupervisedCollator, SupervisedDataset
from data.templates import Template, get_template, register_template
from data.tokenized import TokenizedDataset
from data.truncation import TruncationReport

__all__ = [
    "ComparisonCollator",
    "ComparisonDataset",
    "DataError",
    "DatasetSpec",
    "PreferenceCollator",
    "PreferenceDataset",
    "PromptOnlyCollator",
    "PromptOnlyDataset",
    "RawDataset",
    "RawSample",
    "SafetyPreferenceCollator",
    "SafetyPreferenceDataset",
    "SupervisedCollator",
    "SupervisedDataset",
    "Template",
    "TokenizedDataset",
    "TruncationReport",
    "builtin",
    "get_template",
    "load_dataset_modules",
    "parse_specs",
    "register_template",
]
