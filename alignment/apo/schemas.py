"""What stands in the files of APO's rounds: one pydantic model for each kind of item. See docs/apo-data.md.

Columns that an item has beyond these are kept and written again, but not looked at.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    RootModel,
    StringConstraints,
    model_validator,
)

from data.builtin.apo import SEPARATOR, split_text
from data.builtin.apo_samples import ANSWER

GOLDEN = "golden"
ANSWERS = "sample_*"  # the name under which all sample_0, sample_1, ... are validated


def _as_text(value: Any) -> Any:
    """The original files number queries; everything here names them by text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_query(text: str) -> str:
    if not text.strip() or SEPARATOR in text:
        raise ValueError(f"a query is a text that is not empty and has no {SEPARATOR!r}")
    return text


def _check_joined(text: str) -> str:
    if split_text(text) is None:
        raise ValueError(f"neither 'query{SEPARATOR}answer' nor a Human/Assistant transcript that ends with an answer")
    return text


def _check_score_name(name: str) -> str:
    query_id, colon, key = name.rpartition(":")
    if not (query_id and colon and key):
        raise ValueError("the name of a score is '<query_id>:<answer key>'")
    return name


QueryId = Annotated[str, BeforeValidator(_as_text), StringConstraints(min_length=1)]
Query = Annotated[str, AfterValidator(_check_query)]
AnswerKey = Annotated[str, StringConstraints(pattern=rf"^{ANSWER.pattern}$")]
Joined = Annotated[str, AfterValidator(_check_joined)]
ScoreName = Annotated[str, AfterValidator(_check_score_name)]


class Item(BaseModel):
    """A JSON object of a file."""

    model_config = ConfigDict(strict=True, extra="allow")

    def to_json(self) -> dict[str, Any]:
        """The object as the file has it."""
        unset = {name for name in type(self).model_fields if getattr(self, name) is None}
        return self.model_dump(exclude=unset)


class Golden(Item):
    """A good answer, by people or by a stronger model; its prompt may stand in another file."""

    query_id: QueryId
    golden: str
    query: Query | None = Field(None, validation_alias=AliasChoices("query", "instruction"))


class Samples(Item):
    """A prompt, as a text or as a Human/Assistant transcript, with a policy's answers to it.

    ``answers``: {"sample_0": text, "sample_1": text, ...}, each a column of the file.
    """

    query_id: QueryId
    query: Query = Field(validation_alias=AliasChoices("query", "instruction"))
    answers: dict[AnswerKey, str] = Field(validation_alias=ANSWERS)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "answers" in values:
            raise ValueError("a column 'answers' is not read; answers stand in the columns sample_0, sample_1, ...")
        answers = {key: value for key, value in values.items() if key.startswith("sample_")}
        others = {key: value for key, value in values.items() if key not in answers}
        return others | ({ANSWERS: answers} if answers else {})

    def to_json(self) -> dict[str, Any]:
        """See Item.to_json."""
        values = super().to_json()
        answers = values.pop("answers")
        return {name: values.pop(name) for name in ("query_id", "query")} | answers | values


class Selected(Samples):
    """Samples with what a reward model thinks of them: ``target`` is the best answer, ``scores`` by answer key.

    The authors' files score texts of other columns too, such as hh_best.
    """

    target: str
    scores: dict[str, FiniteFloat]

    @model_validator(mode="after")
    def _fit(self) -> Selected:
        texts = self.answers | {name: text for name, text in self.model_extra.items() if isinstance(text, str)}
        if not self.scores.keys() <= texts.keys() or self.target not in texts.values():
            raise ValueError("'target' must be one of the answers, and 'scores' must name no others")
        return self


class Comparison(Item):
    """Answers to one prompt, each written "query<sep>answer" or as a transcript, with a score for each.

    type: "apo" where a golden answer stands over a policy's.
    """

    text: list[Joined] = Field(min_length=1)
    scores: list[FiniteFloat] = Field(validation_alias=AliasChoices("scores", "score"))
    type: str | None = None
    query_id: QueryId | None = None

    @model_validator(mode="after")
    def _fit(self) -> Comparison:
        if len(self.scores) != len(self.text) or len({tuple(split_text(text)[0]) for text in self.text}) > 1:
            raise ValueError("'scores' must hold a number for each entry of 'text', which must have one query")
        return self


class Scores(RootModel[dict[ScoreName, FiniteFloat]]):
    """{"<query_id>:<answer key>": number}, one or more; split at the last colon, for an id may have some itself."""

    model_config = ConfigDict(strict=True)

    def to_json(self) -> dict[str, float]:
        """See Item.to_json."""
        return self.root
