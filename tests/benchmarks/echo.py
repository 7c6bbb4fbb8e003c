"""A contender without a model: repeats, or dies with words."""

from __future__ import annotations

import sys

from benchmarks.contenders.serving import serve


def repeat(text: str) -> dict:
    print("what a library prints is no answer")
    return {"text": text, "arguments": sys.argv[2:]}


def die(words: str, status: int = 1) -> dict:
    print(words, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    serve({"repeat": repeat, "die": die}, name="echo")
