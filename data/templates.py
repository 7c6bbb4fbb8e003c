"""Prompt templates by name: the text that a model reads before it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.template_process import TemplateError, render_apart

Render = Callable[[list[dict[str, str]], Any], str]


@dataclass(frozen=True)
class Template:
    """How a conversation that waits for an answer is written.

    ``render(messages, tokenizer)`` gets messages ``{"role": "system" | "user" | "assistant", "content": str}`` that
    end with the user's and returns the text up to where the answer begins, generation prompt included. It writes
    the end of earlier assistant turns itself. ``add_special_tokens`` says whether the tokenizer still has to add
    its own (beginning-of-text) tokens; a template that writes them out says False.
    """

    name: str
    render: Render
    add_special_tokens: bool = True

    def prompt(self, turns: Sequence[str], tokenizer: Any, system: str | None = None) -> str:
        """Prompt text of an odd number of turns (user first, user last)."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        roles = ("user", "assistant")
        messages += [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]
        return self.render(messages, tokenizer)


_TEMPLATES: dict[str, Template] = {}


def register_template(name: str, render: Render, add_special_tokens: bool = True) -> Template:
    """Makes ``render`` usable as ``template=name``; see :class:`Template`. A registered name is replaced."""
    if not isinstance(name, str) or not name or not callable(render):
        raise DataError(f"a template needs a non-empty name and a callable, got {name!r} and {render!r}")
    _TEMPLATES[name] = Template(name, render, add_special_tokens)
    return _TEMPLATES[name]


def get_template(name: str | Template) -> Template:
    """The template registered under ``name``. Raises DataError, naming the known ones, when there is none."""
    if isinstance(name, Template):
        return name
    if name not in _TEMPLATES:
        raise DataError(f"unknown prompt template {name!r}; known: {', '.join(sorted(_TEMPLATES))}")
    return _TEMPLATES[name]


def render_chat(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """The tokenizer's own chat template with its generation prompt, rendered as transformers renders it."""
    source = getattr(tokenizer, "chat_template", None)
    if not isinstance(source, str) or not source:
        others = ", ".join(repr(name) for name in sorted(_TEMPLATES) if name != "chat")
        raise DataError(f"prompt template 'chat': the tokenizer has no chat template; choose another one: {others}")
    special = {key: getattr(tokenizer, key, None) or "" for key in ("bos_token", "eos_token", "pad_token")}
    try:
        return render_apart(source, {"messages": messages, "add_generation_prompt": True, "tools": None, **special})
    except TemplateError as error:
        raise DataError(f"prompt template 'chat': the tokenizer's chat template fails: {error}") from error


def render_pku(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """PKU Beaver's format; an earlier answer ends with the end-of-text token."""
    eos = getattr(tokenizer, "eos_token", None) or ""
    parts = {"system": "{} ", "user": "USER: {} ASSISTANT:", "assistant": "{}" + eos}
    return "BEGINNING OF CONVERSATION: " + "".join(parts[m["role"]].format(m["content"]) for m in messages)


def render_hh(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """Anthropic HH's transcript format."""
    parts = {"system": "{}", "user": "\n\nHuman: {}\n\nAssistant:", "assistant": " {}"}
    return "".join(parts[m["role"]].format(m["content"]) for m in messages)


def render_plain(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """The turns themselves, one after another on their own lines."""
    return "\n".join(m["content"] for m in messages)


register_template("chat", render_chat, add_special_tokens=False)
register_template("pku", render_pku)
register_template("hh", render_hh)
register_template("plain", render_plain)
