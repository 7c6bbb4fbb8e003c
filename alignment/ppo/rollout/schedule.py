"""Continuous batching: which tokens to compute next, in which slot, and where in the cache.

An answer occupies a slot from its first token to its last, and the next answer takes the slot at once. Prompts are
taken in lexicographic order, so that each shares with the one before it the longest beginning it shares with any: that
part is computed once, and answers to the same prompt share all of it. A place of the cache (keys and values of one
token) is free again when nobody refers to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FREE, WAITING, DECODING = 0, 1, 2


class Pass(NamedTuple):
    """One pass of the model over rows of tokens, and the tokens to draw after it.

    tokens, positions, slots: int64 [rows].
    wanted: int64 [w], rows whose final hidden states give logits.
    remembered: int64 [k], prompts whose last hidden state was kept from an earlier pass.
    sources: int64 [m], for every token to draw, the row of logits (``wanted``, then ``remembered``).
    drawing: int64 [m], the slots that they are for.
    to_keep: [(index in wanted, prompt)], hidden states that later answers will need.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray
    remembered: np.ndarray
    sources: np.ndarray
    drawing: np.ndarray
    to_keep: list[tuple[int, int]]


class _Prompt:
    """A distinct prompt and the answers that it still owes a slot."""

    def __init__(self, tokens: np.ndarray, answers: list[int]) -> None:
        self.tokens, self.answers = tokens, deque(answers)
        self.table = np.zeros([0], np.int32)
        self.computed = 0  # tokens whose pass is scheduled
        self.slot = -1  # whose table its passes use


class Schedule:
    """Decides the passes for a set of answers.

    Args:
        prompts: int64 [L_i] each, the prompt of every answer; answers to equal prompts share them.
        slots: answers that are decoded together.
        max_new_tokens: longest answer.
        rows: most tokens in a pass, or ``slots`` if that is more; prompts are cut into pieces that fit.
        order: in which answers to equal prompts begin; default: as they are.

    Attributes:
        tables: int32 [slots, longest text], see Kernels.begin.
        answer: int64 [slots], which answer a slot works on, -1 for none.
        length: int64 [slots], tokens drawn so far.
        places: size of the cache.
        computed_prompt_tokens: tokens of prompts that passes have read so far.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        slots: int,
        max_new_tokens: int,
        rows: int,
        order: Sequence[int] | None = None,
    ) -> None:
        self.slots, self.rows = slots, max(rows, slots)
        grouped: dict[tuple[int, ...], list[int]] = {}
        for answer in range(len(prompts)) if order is None else order:
            grouped.setdefault(tuple(prompts[answer].tolist()), []).append(answer)
        self.prompts = [_Prompt(np.asarray(key, np.int64), grouped[key]) for key in sorted(grouped)]
        longest = max((len(prompt.tokens) for prompt in self.prompts), default=0)
        self.places = slots * (longest + max_new_tokens) + longest  # the last prompt's beginning is held
        self.tables = np.zeros([slots, longest + max_new_tokens], np.int32)
        self.free = np.arange(self.places - 1, -1, -1, dtype=np.int32)  # a stack: low places are used first
        self.free_count = self.places
        self.references = np.zeros([self.places], np.int32)
        self.state = np.full([slots], FREE)
        self.answer, self.prompt = np.full([slots], -1), np.full([slots], -1)
        self.filled, self.length, self.token = (np.zeros([slots], np.int64) for _ in range(3))
        self.next_prompt, self.unbegun, self.held = 0, len(prompts), np.zeros([0], np.int32)
        self.prefilling: deque[int] = deque()
        self.computed_prompt_tokens = 0

    @property
    def is_done(self) -> bool:
        """Whether every answer has been finished."""
        return not self.unbegun and not (self.state != FREE).any()

    def next_pass(self, paused: np.ndarray | None = None) -> Pass:
        """The next pass. Args: paused: bool [slots], slots that draw no token this time."""
        known = self._admit()
        decoding = self.state == DECODING
        slots = np.flatnonzero(decoding if paused is None else decoding & ~paused)
        self._extend(slots)
        parts = [(self.token[slots], self.filled[slots] - 1, slots)]
        wanted, sources, drawing, to_keep = list(range(len(slots))), list(range(len(slots))), [slots], []
        for number, last_row, part in self._prefill(len(slots)):
            parts.append(part)
            if last_row is not None:
                waiting = np.flatnonzero((self.state == WAITING) & (self.prompt == number))
                sources += [len(wanted)] * len(waiting)
                if self.prompts[number].answers:
                    to_keep.append((len(wanted), number))
                wanted.append(last_row)
                drawing.append(waiting)
        remembered = list(dict.fromkeys(int(self.prompt[slot]) for slot in known))
        sources += [len(wanted) + remembered.index(self.prompt[slot]) for slot in known]
        drawing.append(np.asarray(known, np.int64))
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        integers = (np.asarray(column, np.int64) for column in (wanted, remembered, sources))
        return Pass(*columns, *integers, np.concatenate(drawing), to_keep)

    def record(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Tell which tokens were drawn, int64 [m] each."""
        self.token[slots] = tokens
        self.length[slots] += 1
        self.state[slots] = DECODING

    def finish(self, slot: int) -> None:
        """Give the slot to the next answer; nothing more is drawn for this one."""
        self._drop(self.tables[slot, : self.filled[slot]])
        self.state[slot], self.answer[slot] = FREE, -1

    # ---- admission --------------------------------------------------------------------------------------------------

    def _admit(self) -> list[int]:
        """Fill free slots; returns those whose prompt was computed in an earlier pass."""
        known = []
        for slot in np.flatnonzero(self.state == FREE)[: self.unbegun]:
            while not self.prompts[self.next_prompt].answers:
                self.next_prompt += 1
            number, prompt = self.next_prompt, self.prompts[self.next_prompt]
            if prompt.slot < 0:
                self._begin(number, slot)
            elif prompt.computed == len(prompt.tokens):
                known.append(int(slot))
            count = len(prompt.tokens)
            self.tables[slot, :count] = prompt.table
            self.references[prompt.table] += 1
            self.state[slot], self.answer[slot], self.prompt[slot] = WAITING, prompt.answers.popleft(), number
            self.filled[slot], self.length[slot] = count, 0
            self.unbegun -= 1
        return known

    def _begin(self, number: int, slot: int) -> None:
        """Find places for a prompt: those of the prompt before it as far as they agree, new ones from there on."""
        prompt, before = self.prompts[number], self.prompts[number - 1].tokens if number else np.zeros([0], np.int64)
        shortest = min(len(before), len(prompt.tokens))
        differs = np.flatnonzero(before[:shortest] != prompt.tokens[:shortest])
        shared = int(differs[0]) if len(differs) else shortest
        shared = min(shared, len(prompt.tokens) - 1)  # the last token's pass gives the first logits
        prompt.table = np.concatenate([self.held[:shared], self._take(len(prompt.tokens) - shared)])
        prompt.computed, prompt.slot = shared, slot
        self.references[prompt.table] += 1
        self._drop(self.held)
        self.held = prompt.table
        self.prefilling.append(number)

    def _prefill(self, first_row: int):
        """Pieces of prompts that still fit the pass: (prompt, row of its last token or None, the piece's rows)."""
        while self.prefilling and first_row < self.rows:
            number = self.prefilling[0]
            prompt = self.prompts[number]
            start, end = prompt.computed, min(len(prompt.tokens), prompt.computed + self.rows - first_row)
            prompt.computed = end
            first_row += end - start
            self.computed_prompt_tokens += end - start
            is_whole = end == len(prompt.tokens)
            if is_whole:
                self.prefilling.popleft()
            piece = (prompt.tokens[start:end], np.arange(start, end), np.full([end - start], prompt.slot))
            yield number, first_row - 1 if is_whole else None, piece

    # ---- places of the cache ----------------------------------------------------------------------------------------

    def _extend(self, slots: np.ndarray) -> None:
        """One more place for the latest token of each slot."""
        places = self._take(len(slots))
        self.tables[slots, self.filled[slots]] = places
        self.references[places] += 1
        self.filled[slots] += 1

    def _take(self, count: int) -> np.ndarray:
        self.free_count -= count
        return self.free[self.free_count : self.free_count + count][::-1].copy()

    def _drop(self, places: np.ndarray) -> None:
        self.references[places] -= 1
        unused = places[self.references[places] == 0]
        self.free[self.free_count : self.free_count + len(unused)] = unused
        self.free_count += len(unused)
