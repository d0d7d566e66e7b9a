"""Where the texts lie, and how they become tokens."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bilect.config.base import Positive, PositiveFloat, Settings

__all__ = ["DataConfig", "SourceConfig"]


class SourceConfig(Settings):
    """One part of the pool, or one target set; either ``path`` or ``dataset``."""

    path: str | None = Field(
        None,
        description="file, directory, glob or fsspec URL: .jsonl, .ndjson, .json, .txt (also .gz, .zst, .bz2, .xz), "
        ".parquet; relative to the config file",
    )
    dataset: str | None = Field(
        None, description="Hub name, or folder, that datasets.load_dataset reads (needs bilect[hub])"
    )
    subset: str | None = Field(None, description="configuration of the dataset, where it has several")
    split: str = Field("train", description="of the dataset")
    source: str | None = Field(None, description="label of its documents that carry none; default: the file's stem")
    fields: dict[Literal["text", "prompt", "response", "messages", "id", "source"], str | tuple[str, ...]] = Field(
        {},
        description="names of the fields where they differ, such as {prompt: question, response: answer}; a path, "
        "{source: meta.title}, or several, {prompt: [instruction, input]}",
    )
    weight: PositiveFloat = Field(
        1.0,
        description="pool: how often warm-up, fit and the random control see its documents per pass; "
        "upper data: weight of its mean loss in the upper objective",
    )

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        return self

    @model_validator(mode="after")
    def _several(self) -> "SourceConfig":
        for kind, names in self.fields.items():
            if not isinstance(names, str) and (not names or kind not in ("text", "prompt", "response")):
                raise ValueError(f"fields.{kind}: give one name" + (", or several" if not names else ""))
        return self


class DataConfig(Settings):
    """Text and its tokens."""

    lower_data: tuple[SourceConfig, ...] = Field(min_length=1, description="the pool to choose from")
    upper_data: tuple[SourceConfig, ...] = Field(min_length=1, description="small target set: what good means")
    heldout_data: tuple[SourceConfig, ...] = Field((), description="for reporting only, never for choosing")
    context: Positive = Field(1024, description="tokens; the paper uses 1024")
    long_documents: Literal["truncate", "chunk"] = Field(
        "truncate", description="documents of the pool longer than the context: keep the start, or cut into pieces"
    )
    on_bad_record: Literal["fail", "skip"] = Field(
        "fail", description="a record that cannot be used: stop, or leave it out, count it and list it"
    )
    duplicates: Literal["drop", "keep", "fail"] = Field(
        "drop",
        description="documents of a set with the text of an earlier one: leave out, count and list; keep; or stop, "
        "before anything is tokenised",
    )
    tokenizer: str | None = Field(
        None, description="directory, Hub name or tokenizer.json; None: trained on the pool unless a model brings one"
    )
    vocab_size: Annotated[int, Field(ge=300)] = Field(4096, description="ids of a tokenizer that is trained here")

    @field_validator("lower_data", "upper_data", "heldout_data", mode="before")
    @classmethod
    def _list_of_sources(cls, value: Any) -> Any:
        several = isinstance(value, list | tuple)
        if not several or not all(isinstance(source, Mapping | SourceConfig) for source in value):
            first = value[0] if several and value else value
            path = first if isinstance(first, str) else "FILE"
            raise ValueError(f"expected a list of sources, such as [{{path: {path}}}]")
        return value
