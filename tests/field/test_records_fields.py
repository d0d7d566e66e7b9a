"""Fields as people name and nest them; conversations and instructions, and what is learned of them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from bilect.config import SourceConfig, parse_source
from bilect.data.batch import IGNORE, make_batch
from bilect.data.documents import check_fields, read_documents, read_input
from bilect.data.loading import PackedWindows
from bilect.data.sources import inputs
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PICKY = (  # without a system role, and with turns that are worded anew once they are not the last
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ '!' if loop.last }}{% endfor %}"
)


def write(path, *records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def documents(path, **more):
    return list(read_documents((parse_source({"path": str(path), **more}),)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user assistant system the sun and the rain", "wind over stone [x] <y>"] * 9, 400)


def with_template(tokenizer, template) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token,
                                   bos_token=tokenizer.bos_token)  # fmt: skip
    copy.chat_template = template
    return copy


def learned(tmp_path, found, tokenizer, context=400):
    """The text of each learned span of each document, and the whole, as tokens tell."""
    write_tokens(found, tokenizer, tmp_path / "t.arrow", context=context)
    store, out = TokenStore(tmp_path / "t.arrow"), []
    for row in range(len(store)):
        ids, given = store.row(row)
        mask = make_batch([(ids, given)], 0).target_BT[0, : len(ids) - 1] != IGNORE
        window = PackedWindows(store, np.array([row]), len(ids), 1, 0)[0]
        assert (window["labels"][1:] != IGNORE).tolist() == mask.tolist()  # training agrees with the upper sets
        cuts = np.flatnonzero(np.diff(np.concatenate([[0], mask.numpy().astype(int), [0]])))
        spans = [tokenizer.decode(ids[1:][a:b]) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        out.append((spans, tokenizer.decode(ids[1:])))
    return out


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_paths_lead_into_objects_and_lists(tmp_path, suffix):
    record = {"meta": {"pile_set_name": "ArXiv", "id": 7}, "a": {"b": [{"text": "deep"}]}, "x": "y"}
    file = write(tmp_path / f"p{suffix}", record)
    fields = {"text": "a.b.0.text", "source": "meta.pile_set_name", "id": "meta.id"}
    (found,) = documents(file, fields=fields)
    assert (found.doc_id, found.source, found.text) == ("7", "ArXiv", "deep")
    check_fields(inputs(SourceConfig(path=str(file), fields=fields))[0])
    flat = write(tmp_path / f"f{suffix}", {"text": "t", "meta.pile": "whole name"})
    assert documents(flat, fields={"source": "meta.pile"})[0].source == "whole name"


def test_a_named_field_that_is_nowhere_is_an_error_that_names_what_is_there(tmp_path):
    file = write(tmp_path / "p.jsonl", *({"text": "t", "meta": {"set": "x"}} for _ in range(3000)))

    def check(path=file, **fields):
        (source,) = inputs(SourceConfig(path=str(path), fields=fields))
        check_fields(source)

    check(source="meta.set")
    for fields in ({"source": "meta.pile"}, {"id": "uuid"}, {"text": "body"}, {"prompt": ["text", "input"]}):
        with pytest.raises(BilectError) as caught:
            check(**fields)
        name = next(n for v in fields.values() for n in ([v] if isinstance(v, str) else v) if n != "text")
        assert str(caught.value) == (
            f"data: {file}: no record has the field '{name}' that data.fields names; there are 'text', 'meta'"
        )
    rare = write(tmp_path / "r.jsonl", *({"text": "t"} for _ in range(3000)), {"text": "t", "label": "x"})
    check(rare, source="label")
    check(write(tmp_path / "empty.jsonl"), source="label")  # a shard without records lacks nothing


def test_an_object_is_no_label_and_no_id(tmp_path):
    file = write(tmp_path / "p.jsonl", {"text": "t", "meta": {"pile_set_name": "x"}, "_id": {"$oid": "a1"}})
    for fields, path in (({"source": "meta"}, "source: meta.pile_set_name"), ({"id": "_id"}, "id: _id.$oid")):
        (source,) = inputs(SourceConfig(path=str(file), fields=fields))
        with pytest.raises(BilectError, match="is an object, no name") as caught:
            check_fields(source)
        assert f"fields: {{{path}}}" in str(caught.value)
        (problem,) = read_input(source)
        assert problem.reason == "id or source is not a name"
    (ok,) = documents(file, fields={"id": "_id.$oid", "source": "meta.pile_set_name"})
    assert (ok.doc_id, ok.source) == ("a1", "x")


TURNS = [
    ("system", "be brief"),
    ("user", "sun?"),
    ("assistant", "the sun"),
    ("user", "rain?"),
    ("assistant", "the rain"),
]
SHAREGPT = {"user": "human", "assistant": "gpt"}
CHATS = {
    "messages": {"messages": [{"role": r, "content": c} for r, c in TURNS]},
    "parts": {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TURNS]},
    "sharegpt": {"conversations": [{"from": SHAREGPT.get(r, r), "value": c} for r, c in TURNS]},
    "system beside": {"system": "be brief", "conversations": [{"from": r, "value": c} for r, c in TURNS[1:]]},
    "prompt and completion": {"prompt": [{"role": r, "content": c} for r, c in TURNS[:-1]],
                              "completion": [{"role": "assistant", "content": "the rain"}]},
}  # fmt: skip
PLAIN = "System: be brief\n\nUser: sun?\n\nAssistant: the sun\n\nUser: rain?\n\nAssistant: the rain"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", CHATS)
def test_conversations_are_recognised_and_the_assistants_turns_learned(tmp_path, tokenizer, name, suffix):
    (found,) = documents(write(tmp_path / f"c{suffix}", CHATS[name]))
    assert found.text == PLAIN and found.messages == tuple(TURNS)
    ((spans, whole),) = learned(tmp_path, [found], tokenizer)
    assert [s.strip() for s in spans] == ["the sun", "the rain"] and whole == PLAIN
    ((spans, whole),) = learned(tmp_path, [found], with_template(tokenizer, CHATML))
    assert spans == ["the sun<|im_end|>", "the rain<|im_end|>"]
    assert whole == "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in TURNS)


def test_a_conversation_under_another_name(tmp_path):
    file = write(tmp_path / "c.jsonl", {"text": "not this", "data": {"chat": CHATS["messages"]["messages"]}})
    assert documents(file, fields={"messages": "data.chat"})[0].text == PLAIN
    assert documents(file)[0].text == "not this"


def test_a_template_that_rewords_earlier_turns_or_refuses(tmp_path, tokenizer):
    picky = with_template(tokenizer, PICKY)
    (found,) = documents(write(tmp_path / "c.jsonl", {"messages": CHATS["messages"]["messages"][1:]}))
    ((spans, whole),) = learned(tmp_path, [found], picky)
    assert spans == ["the sun", "the rain"]
    assert whole == "[user]sun?[assistant]the sun[user]rain?[assistant]the rain!"
    (refused,) = documents(write(tmp_path / "r.jsonl", CHATS["messages"]))
    problems = []
    write_tokens([refused], picky, tmp_path / "r.arrow", context=99, on_problem=problems.append)
    assert [(p.record, p.reason) for p in problems] == [(1, "refused by the chat template")]
    assert "no system role" in problems[0].detail


@pytest.mark.parametrize("context", [8, 20, 30])
def test_a_long_conversation_loses_what_is_given_before_what_is_learned(tmp_path, tokenizer, context):
    turns = [("user", "wind " * 30), ("assistant", "the sun and the rain"), ("user", "x")]
    file = write(tmp_path / "c.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    ((spans, whole),) = learned(tmp_path, documents(file), tokenizer, context)
    assert "the sun and the rain".startswith(spans[0].strip()) and len(spans) == 1
    assert len(tokenizer(whole)["input_ids"]) <= context


def test_instructions_and_completions(tmp_path):
    alpaca = {"instruction": "add", "input": "2 and 2", "output": "4"}
    found = documents(write(tmp_path / "a.jsonl", alpaca, {**alpaca, "input": ""},
                            {"instruction": "who", "context": "a king", "response": "he"},
                            {"prompt": "2+2=", "completion": " 4"}))  # fmt: skip
    assert [d.text for d in found] == ["User: add\n\n2 and 2\n\nAssistant: 4", "User: add\n\nAssistant: 4",
                                       "User: who\n\na king\n\nAssistant: he", "2+2= 4"]  # fmt: skip
    assert [d.text[slice(*d.learned[0])] for d in found[:3]] == ["4", "4", "he"] and found[3].prompt == "2+2="


def test_several_fields_make_one_prompt(tmp_path):
    file = write(tmp_path / "a.jsonl", {"instruction": "add", "input": "2 and 2", "output": "4"},
                 {"instruction": "sing", "input": "", "output": "la"})  # fmt: skip
    found = documents(file, fields={"prompt": ["instruction", "input"], "response": "output"})
    assert [(d.prompt, d.text) for d in found] == [("add\n2 and 2\n", "add\n2 and 2\n4"), ("sing\n", "sing\nla")]
    with pytest.raises(BilectError, match=r"fields\.id: give one name"):
        parse_source({"path": "x", "fields": {"id": ["a", "b"]}})


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ({"messages": "hello"}, "field 'messages': expected a list of objects"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn is the assistant's"),
        ({"messages": [{"role": "assistant", "content": None}]}, "turn 1 (assistant) has no text"),
        ({"messages": [{"who": "me", "content": "x"}]}, "turn 1 has no role, but 'who', 'content'"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "empty document (its response)"),
        ({"instruction": 3, "output": "x"}, "field 'instruction' is a number"),
    ],
)
def test_conversations_that_are_none_say_why(tmp_path, record, detail):
    (source,) = inputs(SourceConfig(path=str(write(tmp_path / "c.jsonl", record))))
    (problem,) = read_input(source)
    assert detail in problem.detail
