"""A user's own JSON, JSON-lines, CSV or Parquet file in one of the common column layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.raw import RawSample
from data.rows import RowDataset, RowError
from data.transcripts import parse_pair, parse_transcript

FLAGS = ("better", "safer", "is_safe", "is_other_safe")
LAYOUTS = (
    "RawSample's fields; messages; prompt/chosen/rejected; chosen/rejected (transcripts or message lists); "
    "instruction/input/output; prompt with answer, response, completion, output or label; prompt alone"
)
SCORES = ("reward", "other_reward")
ANSWERS = ("answer", "response", "completion", "output", "label")
ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1}


class LocalDataset(RowDataset):
    """Rows in any layout of :data:`LAYOUTS`; each row is recognised by its columns."""

    NAME = "local"

    def to_sample(self, row: Mapping[str, Any]) -> RawSample:
        """By the columns that are there: messages, a pair of answers, or the fields of RawSample (docs/data.md)."""
        return self._read(row) | {key: row[key] for key in SCORES if key in row}

    def _read(self, row: Mapping[str, Any]) -> RawSample:
        if "messages" in row or "conversations" in row:
            return read_messages(row.get("messages", row.get("conversations")))
        if "chosen" in row and "rejected" in row:
            return read_pair(row)
        if "instruction" in row:
            text = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
            return RawSample(input=text, answer=row["output"]) if "output" in row else RawSample(input=text)
        if "input" in row or "dialogue" in row:
            sample = {key: row[key] for key in RawSample.__annotations__ if key in row}
            if "answer" not in sample and (name := next((name for name in ANSWERS if name in row), None)):
                sample["answer"] = row[name]
            return RawSample(**{key: read_flag(key, value) for key, value in sample.items()})
        if "prompt" in row:
            sample = read_prompt(row["prompt"])
            if (name := next((name for name in ANSWERS if name in row), None)) is not None:
                sample["answer"] = row[name]
            return sample
        raise RowError(f"columns {', '.join(row) or '(none)'} are in no known layout; known: {LAYOUTS}")


def read_flag(key: str, value: Any) -> Any:
    """0 and 1 as booleans where a flag is meant (CSV has no other way)."""
    return bool(value) if key in FLAGS and value in (0, 1) else value


def read_messages(messages: Any) -> RawSample:
    """A list of {"role", "content"} (or {"from", "value"}) messages; without a last answer it is a prompt."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise RowError("'messages' must be a list of {role, content} objects")
    pairs = [(str(m.get("role", m.get("from"))), m.get("content", m.get("value"))) for m in messages]
    sample = RawSample()
    if pairs[0][0] == "system":
        sample["system"], pairs = pairs[0][1], pairs[1:]
    turns = [content for _, content in pairs]
    roles = [ROLES.get(role) for role, _ in pairs]
    if not turns or roles != [place % 2 for place in range(len(roles))] or not all(isinstance(t, str) for t in turns):
        got = ", ".join(role for role, _ in pairs)
        raise RowError(f"'messages' must alternate user and assistant texts, starting with the user; roles: {got}")
    if len(turns) % 2:
        sample["input"] = turns
    else:
        sample.update(dialogue=turns, input=turns[:-1], answer=turns[-1])
    return sample


def read_prompt(prompt: Any) -> RawSample:
    """A text, a transcript that waits for the assistant, or a message list that ends with the user."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        sample = read_messages(prompt)
        if "dialogue" in sample:
            raise RowError("'prompt' must end with a user message")
        return sample
    turns = parse_transcript(prompt) if isinstance(prompt, str) else None
    if turns is not None and len(turns) % 2 == 0 and turns[-1] == "":
        turns = turns[:-1]
    return RawSample(input=prompt if turns is None or len(turns) % 2 == 0 else turns)


def read_pair(row: Mapping[str, Any]) -> RawSample:
    """A preference pair; ``chosen`` and ``rejected`` are answers, or whole conversations."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):
        return read_message_pair(row)
    if "prompt" in row:
        sample = read_prompt(row["prompt"])
    else:
        pair = parse_pair(chosen, rejected)
        if pair is None:
            raise RowError("'chosen' and 'rejected' are no transcripts that differ in the last answer only")
        turns, chosen, rejected = pair
        sample = RawSample(input=turns)
    sample["answer"], sample["other_answer"], sample["better"] = chosen, rejected, True
    return sample


def read_message_pair(row: Mapping[str, Any]) -> RawSample:
    """``chosen`` and ``rejected`` as message lists: whole conversations, or answers to ``prompt``'s messages."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(row.get("prompt"), list):
        chosen, rejected = row["prompt"] + chosen, row["prompt"] + rejected
    first, second = read_messages(chosen), read_messages(rejected)
    turns, others = first.get("dialogue"), second.get("dialogue")
    if turns is None or others is None or turns[:-1] != others[:-1]:
        raise RowError("'chosen' and 'rejected' are no message lists that differ in the last answer only")
    sample = RawSample(input=turns[:-1], answer=turns[-1], other_answer=others[-1], better=True)
    if "system" in first:
        sample["system"] = first["system"]
    return sample
