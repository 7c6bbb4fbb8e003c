"""Alignment of language models on PaddlePaddle: supervised stage, reward model, online RL.

Importing the package sets environment variables that Paddle reads while it loads, and imports nothing heavy.
"""

from __future__ import annotations

from alignment.runtime.bootstrap import distrust_working_directory, prepare_environment

__version__ = "0.1.0"

distrust_working_directory()
prepare_environment()
