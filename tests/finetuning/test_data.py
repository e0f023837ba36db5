"""Rows become entries, entries become tokens, and the right tokens count."""

import gzip
import json

import numpy as np
import pytest
from families import character_tokenizer
from transformers import AutoTokenizer

from dbes.errors import FinetuneError, SettingError
from dbes.models.encoding import collate, encode, pack, training_samples, windows
from dbes.tasks.entries import TARGET, Entry, hold_out, prepare_data, read_entries

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHAT = [
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "two"},
]


def chat_tokenizer(template=TEMPLATE):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def counted_text(sample, tokenizer):
    return "".join(tokenizer.convert_ids_to_tokens(sample.ids[sample.counted].tolist()))


def text_entry(text, **named):
    return Entry(id="x", source="x", segments=((text, True),), **named)


def test_a_text_counts_from_its_first_character_on_where_a_token_stands_before_it():
    tokenizer = character_tokenizer()
    sample = encode(text_entry("abc"), tokenizer, end=True)
    assert tokenizer.convert_ids_to_tokens(sample.ids.tolist()) == ["<s>", "a", "b", "c", "</s>"]
    assert sample.counted.tolist() == [False, True, True, True, True]
    assert sample.text_bytes == 3
    assert encode(text_entry("abc"), tokenizer, end=False).ids.tolist() == sample.ids.tolist()[:-1]


def test_a_first_token_that_nothing_precedes_is_not_counted_nor_are_its_bytes():
    sample = encode(text_entry("abc"), character_tokenizer(special=False), end=False)
    assert sample.counted.tolist() == [False, True, True]
    assert sample.text_bytes == 2


def test_bytes_are_those_of_utf8(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    sample = encode(text_entry("xäß€"), tokenizer, end=False)
    assert sample.text_bytes == len("äß€".encode())
    assert sample.counted.sum() == 7


def test_only_the_completion_counts():
    tokenizer = character_tokenizer()
    entry = Entry(id="x", source="x", segments=(("2+2=", False), (" 4", True)))
    assert counted_text(encode(entry, tokenizer, end=True), tokenizer) == " 4</s>"
    assert encode(entry, tokenizer, end=False).text_bytes == 2


@pytest.mark.parametrize(("first", "expected"), [(0, "one</s>two</s>"), (2, "two</s>")])
def test_only_the_assistants_turns_count(first, expected):
    tokenizer = chat_tokenizer()
    sample = encode(Entry(id="x", source="x", messages=tuple(CHAT), first=first), tokenizer, end=True)
    assert counted_text(sample, tokenizer) == expected
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert sample.ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{{ messages | length }}", "rewrites earlier turns")],
)
def test_templates_that_cannot_serve_are_refused(template, message):
    with pytest.raises(FinetuneError, match=message):
        encode(Entry(id="x", source="x", messages=tuple(CHAT)), chat_tokenizer(template), end=True)


def test_windows_predict_every_counted_token_once():
    tokenizer = character_tokenizer()
    sample = encode(text_entry("abcdefghij"), tokenizer, end=True)
    parts = windows(sample, 5)
    assert [len(part.ids) for part in parts] == [5, 5, 4]
    assert "".join(counted_text(part, tokenizer) for part in parts) == "abcdefghij</s>"
    assert not any(part.counted[0] for part in parts)
    prompt = Entry(id="x", source="x", segments=(("a" * 20, False), ("b", True)))
    assert [counted_text(part, tokenizer) for part in windows(encode(prompt, tokenizer, end=False), 5)] == ["b"]


def test_packing_fills_sequences_and_leaves_out_no_text():
    tokenizer = character_tokenizer()
    entries = [text_entry(text) for text in ("abc", "defgh", "ij")]
    packed = training_samples(entries, tokenizer, length=8, packing=True)
    assert [len(sample.ids) for sample in packed] == [8, 8, 2]
    assert "".join(counted_text(sample, tokenizer) for sample in packed) == "abc</s>defgh</s>ij</s>"
    alone = training_samples(entries, tokenizer, length=8, packing=False)
    assert [counted_text(sample, tokenizer) for sample in alone] == ["abc</s>", "defgh</s>", "ij</s>"]
    assert pack([], 8) == []


def test_conversations_are_never_packed():
    entries = [text_entry("abc"), text_entry("de"), Entry(id="c", source="c", messages=tuple(CHAT[:2]))]
    assert len(training_samples(entries, chat_tokenizer(), length=200, packing=True)) == 2


def test_batches_are_padded_on_the_right_and_masked():
    tokenizer = character_tokenizer()
    batch = collate([encode(text_entry(text), tokenizer, end=False) for text in ("abc", "d")], padding=0)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.counted.tolist() == [[False, True, True, True], [False, True, False, False]]
    assert batch.tokens == 4
    assert "attention_mask" not in collate([encode(text_entry("abc"), tokenizer, end=False)] * 2, padding=0).inputs


def test_rows_of_every_kind(tmp_path):
    rows = [
        {"text": "plain", "id": "t"},
        {"messages": CHAT},
        {"prompt": "2+2=", "completion": "4", "choices": ["3", "4"]},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"text": " "},
    ]
    entries = read_entries(lines(tmp_path / "rows.jsonl", rows))
    assert [bool(entry.messages) for entry in entries] == [False, True, False, True]
    assert entries[0].id == "t" and entries[3].first == 1
    assert entries[2].item is not None and entries[2].item.right == 1
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [entry.segments for entry in read_entries(tmp_path / "rows.json")] == [entry.segments for entry in entries]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows[0]))
    assert read_entries(tmp_path / "rows.jsonl.gz")[0].segments == (("plain", True),)
    (tmp_path / "one.txt").write_text("whole file\n")
    assert read_entries(tmp_path / "one.txt")[0].segments == (("whole file", True),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the data is empty"),
        ('{"text": ""}\n', "the data is empty"),
        ('{"body": "x"}\n', "or prompt and completion; this one has body"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "no message has the role assistant"),
        ('{"messages": ["x"]}\n', "every message has role and content"),
        ('{"prompt": "x", "completion": " "}\n', "completion is empty"),
        ("{", r"rows.jsonl:1: not JSON"),
    ],
)
def test_rows_that_cannot_serve_are_refused(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(FinetuneError, match=message):
        read_entries(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "here text is null"),
        ({"text": ["x"]}, "here text is a list"),
        ({"text": "a \ud83d"}, "field 'text' holds half of a surrogate pair"),
        ({"text": "a", "id": {}}, "field 'id' is an object"),
        ({"prompt": "a", "completion": None}, "here prompt is text, completion is null"),
        ({"prompt": "\ud83d", "completion": "b"}, "field 'prompt' holds half"),
        ({"messages": "x"}, "here messages is text"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"field 'messages\[0\].content' is null, expected text"),
        ({"messages": [{"role": "assistant", "content": {"a": 1}}]}, r"messages\[0\].content' is an object"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, r"messages\[0\].content' is a list"),
        ({"messages": [{"role": "assistant", "content": "\udc00"}]}, r"messages\[0\].content' holds half"),
        ({"text": "t", "question": "q", "choices": ["x", {"y": 1}], "answer": 0}, r"field 'choices\[1\]' is an object"),
    ],
)
def test_fields_that_are_no_text_are_named_by_row(tmp_path, row, message):
    with pytest.raises(FinetuneError, match=rf"rows\.jsonl:1: .*{message}"):
        read_entries(lines(tmp_path / "rows.jsonl", [row]))


def test_text_in_parts_and_calls_of_tools_are_text(tmp_path):
    parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]
    rows = [{"role": "assistant", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    (entry,) = read_entries(lines(tmp_path / "rows.jsonl", [{"messages": rows}]))
    assert [message["content"] for message in entry.messages] == ["one", ""]


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ unknown.field.deeper }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
    ],
)
def test_a_chat_template_that_fails_is_named_by_row(tmp_path, template, cause):
    (entry,) = read_entries(lines(tmp_path / "rows.jsonl", [{"messages": CHAT}]))
    with pytest.raises(FinetuneError, match=rf"rows\.jsonl:1: the chat template .* refuses the conversation \({cause}"):
        encode(entry, chat_tokenizer(template), end=True)


def test_tokens_that_the_model_does_not_know_are_named_by_row(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    (entry,) = read_entries(lines(tmp_path / "rows.jsonl", [{"text": "a<|tool|>"}]))
    assert len(encode(entry, tokenizer, end=True, known=100).ids) == 4
    with pytest.raises(FinetuneError, match=r"rows\.jsonl:1: token '<\|tool\|>' \(id 99, at position 2\) is beyond"):
        training_samples([entry], tokenizer, length=8, packing=True, known=99)


def test_files_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(FinetuneError, match="no such file; give a file, or task:DOMAIN"):
        read_entries(tmp_path / "missing.jsonl")
    (tmp_path / "rows.json").write_text('[{"text": "x"}, 7]')
    with pytest.raises(FinetuneError, match=r"rows\.json: entry 2 of the array is int"):
        read_entries(tmp_path / "rows.json")
    (tmp_path / "rows.xml").write_text("x")
    with pytest.raises(FinetuneError, match="format not told"):
        read_entries(tmp_path / "rows.xml")


def test_alpaca_and_sharegpt_rows_are_prompts_and_conversations(tmp_path):
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    bare = {"instruction": "Greet.", "input": "", "output": "Hello"}
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    (tmp_path / "rows.json").write_text(json.dumps([alpaca, bare, shared]))
    first, second, third = read_entries(tmp_path / "rows.json")
    assert first.segments == (("Add.\n\n1 and 2\n\n", False), ("3", True))
    assert second.segments == (("Greet.\n\n", False), ("Hello", True))
    assert [(turn["role"], turn["content"]) for turn in third.messages] == [("user", "Hi"), ("assistant", "Hello")]


def test_held_out_texts_share_no_source_with_training_and_do_not_depend_on_order():
    entries = [Entry(id=str(number), source=str(number // 2), segments=(("x", True),)) for number in range(40)]
    training, kept = hold_out(entries, where="here")
    assert len(training) == 32 and len(kept) == 8
    assert not {entry.source for entry in training} & {entry.source for entry in kept}
    assert {entry.id for entry in hold_out(entries[::-1], where="here")[1]} == {entry.id for entry in kept}
    with pytest.raises(FinetuneError, match="here: 1 text; at least 2"):
        hold_out(entries[:2], where="here")


def test_data_of_a_domain_and_of_a_file(tiny_task, tmp_path):
    found = prepare_data("task:law", tasks=tiny_task)
    assert found.target == "law" and list(found.heldout) == ["law", "code", "math"]
    assert len(found.training) == 10 and {len(part) for part in found.heldout.values()} == {2}
    assert not {entry.id for entry in found.training} & {entry.id for entry in found.heldout["law"]}
    assert {len(part) for part in prepare_data("task:law", tasks=tiny_task, limit=1).heldout.values()} == {1}
    file = prepare_data(str(lines(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])), tasks=tiny_task)
    assert list(file.heldout) == [TARGET, "law", "code", "math"] and len(file.training) == 1
    assert file.digest != found.digest == prepare_data("task:law", tasks=tiny_task).digest
    with pytest.raises(SettingError, match="no domain of task 'tiny' is called 'latin'; there are law, code, math"):
        prepare_data("task:latin", tasks=tiny_task)


def test_the_answer_of_an_item_may_be_its_text_index_or_letter(tmp_path):
    rows = [{"text": "t", "question": "q", "choices": ["x", "y"], "answer": answer} for answer in ("y", 1, "B", "z", None)]
    items = [entry.item for entry in read_entries(lines(tmp_path / "x.jsonl", rows))]
    assert [item and item.right for item in items] == [1, 1, 1, None, None]
    assert np.all([item.choices == ("x", "y") for item in items[:3]])
