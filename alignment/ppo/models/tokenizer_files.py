"""The files of a tokenizer, kept in memory so that every checkpoint carries them unchanged."""

from __future__ import annotations

from pathlib import Path

from alignment.ppo.models.config import read_json
from alignment.runtime.faults import UsageError

CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model")  # one content; transformers' name and PaddleNLP's
TOKENIZER_FILES = (
    CONFIG_FILE,
    "tokenizer.json",
    *SENTENCEPIECE,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    *CHAT_TEMPLATES,
)


class TokenizerFiles:
    """Content of a model directory's tokenizer files.

    Attributes:
        directory: where they were read.
        config: tokenizer_config.json with special_tokens_map.json beneath it; empty if there are none.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._content = {
            name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()
        }
        self.config: dict = {}
        for name in ("special_tokens_map.json", CONFIG_FILE):
            if name in self:
                self.config |= read_json(directory / name)

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def sentencepiece(self) -> Path | None:
        """The sentencepiece model, under either name."""
        return next((self.directory / name for name in SENTENCEPIECE if name in self), None)

    def text(self, name: str) -> str:
        """A file's content; UsageError if it is not UTF-8."""
        try:
            return self._content[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.directory / name}: not UTF-8 text ({error})") from None

    def contents(self) -> dict[str, bytes]:
        """The files as they were read, a sentencepiece model under both names."""
        return {
            written: content
            for name, content in self._content.items()
            for written in (SENTENCEPIECE if name in SENTENCEPIECE else (name,))
        }

    def write(self, directory: Path) -> None:
        """Write ``contents``."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents().items():
            (directory / name).write_bytes(content)

    def special_token(self, kind: str) -> str | None:
        """Text of "bos_token", "eos_token" or "pad_token"; a config names it by a string or an object."""
        token = self.config.get(kind)
        return token.get("content") if isinstance(token, dict) else token

    def chat_template(self) -> str | None:
        """Jinja source of the chat template as Hugging Face stores it; the "default" one if there are several."""
        if "chat_template.jinja" in self:
            return self.text("chat_template.jinja")
        template = self.config.get("chat_template")
        if isinstance(template, list):
            return {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is None and "chat_template.json" in self:  # PaddleNLP's file of that name holds no Jinja source
            template = read_json(self.directory / "chat_template.json").get("chat_template")
        return template
