"""Prompt templates."""

from __future__ import annotations

import os

import pytest

from data import DataError, PromptOnlyDataset, RawDataset, get_template, register_template, template_process
from data import templates as template_module

TURNS = ["Hi", "Hello!", "Why?"]


def test_chat_uses_the_tokenizers_own_template(tokenizer):
    text = get_template("chat").prompt(TURNS, tokenizer)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
        "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        get_template("chat").prompt(["Hi"], tokenizer, "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end")
    )
    assert not get_template("chat").add_special_tokens


def test_chat_features_of_published_templates(tokenizer):
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}\n{{ strftime_now('%%') }}"
    )
    assert get_template("chat").prompt(["é"], tokenizer, "x") == '<s>{"role": "user", "content": "é"}%'


def test_missing_chat_template_names_the_alternatives(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template; choose another one: 'hh', 'pku', 'plain'"):
        PromptOnlyDataset("hh-excerpt/test", tokenizer)


@pytest.mark.parametrize("source", ["{% if %}", "{{ raise_exception('no system') }}", "{{ messages.x.y }}"])
def test_failing_chat_template_is_a_data_error(tokenizer, source):
    tokenizer.chat_template = source
    with pytest.raises(DataError, match="the tokenizer's chat template fails") as info:
        get_template("chat").prompt(TURNS, tokenizer)
    assert "\n" not in str(info.value)


def test_chat_template_runs_in_a_sandbox(tokenizer):
    tokenizer.chat_template = "{{ messages.append(1) }}"
    with pytest.raises(DataError, match="chat template fails"):
        get_template("chat").prompt(TURNS, tokenizer)

@pytest.mark.parametrize(
    "source",
    [
        "{{ 99999999 ** 99999999 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x'.center(9999999999) }}",
        "{% set s = namespace(t='x') %}{% for a in range(60) %}{% set s.t = s.t + s.t %}{% endfor %}{{ s.t }}",
    ],
)
def test_chat_template_that_would_never_end(source, tokenizer):
    tokenizer.chat_template = source
    with pytest.raises(DataError, match="chat template fails") as fault:
        get_template("chat").prompt(TURNS, tokenizer)
    assert "\n" not in str(fault.value)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert get_template("chat").prompt(TURNS, tokenizer) == "Hi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{{ strftime_now.__globals__ }}",
    ],
)
def test_chat_template_that_reaches_for_python(source, tokenizer):
    """It fails, or reads nothing."""
    tokenizer.chat_template = source
    try:
        assert get_template("chat").prompt(TURNS, tokenizer) == ""
    except DataError as fault:
        assert "chat template fails" in str(fault)


def test_a_child_process_renders_by_itself(tokenizer):
    """After a fork both would write to one renderer otherwise, and read each other's texts."""
    get_template("chat").prompt(TURNS, tokenizer)
    before = template_process._renderer.process.pid
    child = os.fork()
    if child == 0:
        text = get_template("chat").prompt(["child"], tokenizer)
        os._exit(0 if "child" in text and template_process._renderer.process.pid != before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert "Why?" in get_template("chat").prompt(TURNS, tokenizer)
    assert template_process._renderer.process.pid == before


def test_pku(tokenizer):
    template = get_template("pku")
    assert template.prompt(["Hi"], tokenizer) == "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:"
    expected = "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Hello!<|im_end|>USER: Why? ASSISTANT:"
    assert template.prompt(TURNS, tokenizer) == expected
    ids = PromptOnlyDataset("hh-excerpt/test", tokenizer, template="pku")[0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id


def test_text_with_braces_is_not_interpreted(tokenizer):
    for name in ("chat", "pku", "hh", "plain"):
        assert "{x} {{ y }} {0}" in get_template(name).prompt(["{x} {{ y }} {0}"], tokenizer)


def test_hh_and_plain(tokenizer):
    expected = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    assert get_template("hh").prompt(TURNS, tokenizer) == expected
    assert get_template("plain").prompt(["text TL;DR:"], tokenizer) == "text TL;DR:"


def test_user_defined_template(tokenizer, monkeypatch):
    monkeypatch.setattr(template_module, "_TEMPLATES", dict(template_module._TEMPLATES))
    register_template(
        "shout", lambda messages, tokenizer: messages[-1]["content"].upper() + "!", add_special_tokens=False
    )
    dataset = PromptOnlyDataset("hh-excerpt/test", tokenizer, template="shout")
    question = RawDataset.load("hh-excerpt/test")[0]["input"][-1]
    assert dataset[0]["prompt"] == tokenizer.decode(dataset[0]["input_ids"]) == question.upper() + "!"
    with pytest.raises(DataError, match="unknown prompt template 'nope'; known: chat, hh, pku, plain, shout"):
        PromptOnlyDataset("hh-excerpt/test", tokenizer, template="nope")


def test_appended_end_of_text_is_removed(tokenizer):
    plain = PromptOnlyDataset("hh-excerpt/test", tokenizer, template="pku")[0]["input_ids"]

    class Appending(type(tokenizer)):
        def __call__(self, text, add_special_tokens=True):
            ids = super().__call__(text, add_special_tokens)["input_ids"]
            return {"input_ids": ids + [self.eos_token_id] if add_special_tokens else ids}

    dataset = PromptOnlyDataset("hh-excerpt/test", Appending(tokenizer.backend), template="pku")
    assert dataset[0]["input_ids"].tolist() == plain.tolist()
