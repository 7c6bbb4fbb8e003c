"""Tokenizers of both kinds behind one interface: ``tokenizer.json`` and PaddleNLP's own (sentencepiece or merges).

PaddleNLP's fast tokenizers replace what a tokenizer.json says (post-processor, special tokens) by their class's
defaults, so that file goes to the ``tokenizers`` library itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import paddlenlp.transformers
from paddlenlp.transformers import PretrainedTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from alignment.ppo.models.config import read_json
from alignment.ppo.models.loading import resolve_model_directory
from alignment.ppo.models.tokenizer_files import CHAT_TEMPLATES, CONFIG_FILE, SENTENCEPIECE, TokenizerFiles
from alignment.runtime.faults import UsageError


class Tokenizer:
    """What data sets, rollout and checkpoints need of a tokenizer.

    Attributes:
        bos_token, eos_token, pad_token: texts; bos_token and pad_token may be None, eos_token is always there.
        bos_token_id, eos_token_id, pad_token_id: their ids. Without a pad token pad_token_id is the EOS id: it only
            fills tensors, for masks never come from ids.
        chat_template: Jinja source in Hugging Face's form, or None.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self.chat_template = files.chat_template()
        self.bos_token, self.bos_token_id = self._special("bos_token")
        self.eos_token, self.eos_token_id = self._special("eos_token")
        self.pad_token, self.pad_token_id = self._special("pad_token")
        if self.eos_token is None:
            raise UsageError(f"{files.directory}: no eos_token in tokenizer_config.json; answers could not end")
        if self.pad_token_id is None:
            self.pad_token_id = self.eos_token_id

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, list]:
        """{"input_ids": list[int]} for a text, {"input_ids": list[list[int]]} for several."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens)}
        return {"input_ids": [self.encode(one, add_special_tokens) for one in text]}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written in the text become their ids."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids, spaces untouched."""
        raise NotImplementedError

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """``decode`` of each."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        raise NotImplementedError

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None if there is no such token."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.get_vocab())

    @property
    def vocab_size(self) -> int:
        """The same number as ``len``: one above the largest id that can occur, if ids have no gap."""
        return len(self)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer's files as they were read."""
        self.files.write(Path(directory))

    def _special(self, kind: str) -> tuple[str | None, int | None]:
        token = self.files.special_token(kind)
        if token is None:
            return None, None
        index = self.token_to_id(token)
        if index is None:
            raise UsageError(f"{self.files.directory}: {kind} {token!r} is not in the vocabulary")
        return token, index


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, with the added tokens that only tokenizer_config.json may list."""

    def __init__(self, files: TokenizerFiles) -> None:
        try:
            self.backend = Backend.from_str(files.text("tokenizer.json"))
        except UsageError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise UsageError(f"{files.directory / 'tokenizer.json'}: not a tokenizer ({error})") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self._add_missing_tokens(files)
        super().__init__(files)

    def _add_missing_tokens(self, files: TokenizerFiles) -> None:
        listed = files.config.get("added_tokens_decoder", {})
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            if self.backend.token_to_id(entry["content"]) is None:
                options = {name: entry.get(name, False) for name in ("single_word", "lstrip", "rstrip", "normalized")}
                add = self.backend.add_special_tokens if entry.get("special") else self.backend.add_tokens
                add([AddedToken(entry["content"], **options)])
        known = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        special = [files.special_token(kind) for kind in ("bos_token", "eos_token", "pad_token")]
        for token in special:
            if token and token not in known and self.backend.token_to_id(token) is not None:
                self.backend.add_special_tokens([AddedToken(token, normalized=False)])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)


class PaddleTokenizer(Tokenizer):
    """A tokenizer that PaddleNLP implements: a sentencepiece model, or ``vocab.json`` with ``merges.txt``."""

    def __init__(self, files: TokenizerFiles) -> None:
        kind = files.config.get("tokenizer_class") or ("LlamaTokenizer" if files.sentencepiece() else "")
        implementation = getattr(paddlenlp.transformers, str(kind).removesuffix("Fast"), None)
        if not (isinstance(implementation, type) and issubclass(implementation, PretrainedTokenizer)):
            raise UsageError(f"{files.directory}: tokenizer_class {kind!r} is unknown, and there is no tokenizer.json")
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.backend = _load_copy(implementation, files, Path(folder))
        except Exception as error:  # sentencepiece and PaddleNLP raise many kinds
            reason = " ".join(str(error).split()) or repr(error)
            raise UsageError(f"{files.directory}: {kind} cannot load the tokenizer ({reason})") from error
        super().__init__(files)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        ids = [int(index) for index in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def _special(self, kind: str) -> tuple[str | None, int | None]:
        if self.files.special_token(kind) is None and getattr(self.backend, kind) is not None:
            token = str(getattr(self.backend, kind))  # the class's default, e.g. "</s>"
            return token, self.token_to_id(token)
        return super()._special(kind)


def _load_copy(implementation: type, files: TokenizerFiles, folder: Path) -> PretrainedTokenizer:
    """PaddleNLP's tokenizer without the chat template, which it would compile in this process, without limits."""
    files.write(folder)
    for name in CHAT_TEMPLATES:
        (folder / name).unlink(missing_ok=True)
    if (folder / CONFIG_FILE).exists():
        settings = read_json(folder / CONFIG_FILE)
        settings.pop("chat_template", None)
        (folder / CONFIG_FILE).write_text(json.dumps(settings), encoding="utf-8")
    model = {"vocab_file": str(folder / SENTENCEPIECE[0])} if files.sentencepiece() else {}
    return implementation.from_pretrained(str(folder), **model)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a model (see ``load_policy`` for names). tokenizer.json goes before other files.

    Raises:
        UsageError: no such model, no tokenizer files, a damaged file, or no EOS token.
    """
    directory = resolve_model_directory(name_or_path)
    files = TokenizerFiles(directory)
    if "tokenizer.json" in files:
        return JsonTokenizer(files)
    if files.sentencepiece() or "vocab.json" in files:
        return PaddleTokenizer(files)
    raise UsageError(f"{directory}: no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json)")
