"""Readers, rows to conversations, de-duplication and the split: texts are kept, and faults are one plain line each."""

import datetime
import io
import json
import os
import shlex
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_utils
from data_utils import load_conversations
from message_utils import UserError, counted

ODD_TEXTS = (
    "None",
    "NA",
    "null",
    "nan",
    "007",
    "1.50",
    "1e5",
    "2024-01-31",
    "2024-01-31T10:00:00Z",
    "True",
    " nan ",
    "  two spaces before and after  ",
    "\ttab",
    "first line\nsecond line\n\nfourth line",
    "windows\r\nline",
    'a "quoted" word',
    "a, b; c\td",
    "=1+1",
    "\\n stays two characters",
    "\u2028 line separator \x85 and \u00a0",
    "naïve 日本語 ☃ 👩‍👩‍👧",
)
JSON_ROWS = '[{"instruction": "q", "response": "a"}]'


@pytest.fixture
def write(tmp_path):
    """write("rows.csv", text or bytes) -> path."""

    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write_file


def one_line(message):
    assert message
    assert "\n" not in message
    assert "\r" not in message
    return message


def refusal(path, mapping=None):
    """The one-line message of the UserError with which a file is refused."""
    with pytest.raises(UserError) as caught:
        load_conversations(path, mapping)
    return one_line(str(caught.value))


def pairs(path, mapping=None):
    """[(prompt, answer), ...] of a file of single turns."""
    conversations, _ = load_conversations(path, mapping)
    return [tuple(message["content"] for message in messages) for _, messages in conversations]


def csv_cell(text):
    return '"' + text.replace('"', '""') + '"'


def rows_of(*contents):
    return [[{"role": "user", "content": text}, {"role": "assistant", "content": "a"}] for text in contents]


# ---- Texts are kept --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_every_text_is_read_exactly_as_it_was_written(write, suffix):
    rows = [(text, f"{text}!") for text in ODD_TEXTS] + [(f"{text}?", text) for text in ODD_TEXTS]
    objects = [json.dumps({"instruction": q, "response": a}, ensure_ascii=False) for q, a in rows]
    content = {
        ".json": "[" + ",\n".join(objects) + "]",
        ".jsonl": "\n".join(objects),
        ".csv": "instruction,response\r\n" + "\r\n".join(f"{csv_cell(q)},{csv_cell(a)}" for q, a in rows),
    }[suffix]
    assert pairs(write(f"rows{suffix}", content)) == rows


def test_a_nul_inside_a_json_text_is_kept(write):
    assert pairs(write("rows.json", json.dumps([{"instruction": "nul \x00 inside", "response": "a"}]))) == [
        ("nul \x00 inside", "a")
    ]


def test_unquoted_csv_cells_keep_their_blanks_and_zeros(write):
    assert pairs(write("rows.csv", "instruction,response\n 007 ,NA\n2024-01-31, nan \n")) == [
        (" 007 ", "NA"),
        ("2024-01-31", " nan "),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", JSON_ROWS),
        ("rows.jsonl", '{"instruction": "q", "response": "a"}\n'),
        ("rows.csv", "instruction,response\nq,a\n"),
        ("ROWS.JSON", JSON_ROWS),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_dropped(write, name, content, mark):
    assert pairs(write(name, mark + content.encode())) == [("q", "a")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_columns_may_be_separated_by_commas_semicolons_and_tabs(write, delimiter):
    content = f'instruction{delimiter}response\n"a, b; c\td"{delimiter}done\n'
    assert pairs(write("rows.csv", content)) == [("a, b; c\td", "done")]


def test_blank_lines_of_jsonl_and_csv_are_no_rows(write):
    assert pairs(write("rows.jsonl", '\n{"instruction": "q", "response": "a"}\r\n\n \n')) == [("q", "a")]
    assert pairs(write("rows.csv", "instruction,response\n\nq,a\n\n")) == [("q", "a")]


def test_json_rows_nested_under_one_key_are_found(write):
    assert pairs(write("rows.json", f'{{"version": 2, "data": {JSON_ROWS}}}')) == [("q", "a")]


def test_jsonl_rows_are_numbered_by_their_lines(write):
    conversations, _ = load_conversations(write("rows.jsonl", '\n\n{"instruction": "q", "response": "a"}'))
    assert [number for number, _ in conversations] == [3]


# ---- Files that cannot be read ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("instruction,response\nq,a\n".encode("utf-16"), 1),
        ("instruction,response\nq,a\ncafé,b\n".encode("latin-1"), 3),
        (b"instruction,response\nq,a\n\nd,\x80", 4),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_another_encoding_than_utf_8_is_refused_with_its_line(write, suffix, content, line):
    if suffix == ".jsonl":  # its lines are parsed as they are read
        for text in (b"instruction,response\n", b"q,a\n"):
            content = content.replace(text, JSON_ROWS[1:-1].encode() + b"\n")
    message = refusal(write(f"rows{suffix}", content))
    assert f"line {line}:" in message
    assert "UTF-8" in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_said_to_be_empty(write, suffix, content):
    message = refusal(write(f"rows{suffix}", content))
    assert f"rows{suffix} is empty" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.json", "[]"), ("rows.json", '{"data": []}'), ("rows.csv", "instruction,response\n"), ("rows.csv", "a,b")],
)
def test_a_file_without_rows_is_said_to_hold_none(write, name, content):
    assert "holds no rows" in refusal(write(name, content))


def test_a_missing_file_a_folder_and_an_unknown_type_are_three_messages(write, tmp_path):
    assert "absent.json does not exist" in refusal(tmp_path / "absent.json")
    assert "is a folder" in refusal(tmp_path)
    message = refusal(write("rows.xml", "<rows/>"))
    assert "'.xml'" in message
    assert ".jsonl" in message


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.json.gz"])
def test_a_binary_file_of_an_unknown_type_is_not_said_to_be_badly_encoded(write, name):
    assert "unknown file type" in refusal(write(name, b"PK\x03\x04\xff\xfe\x80\x00"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[\n{"instruction": "q", "response": "a"},\n{"instruction": "q" "response"}\n]', 3),
        ('[\n{"instruction": "q", "response": "a"}\n', 3),
        ('[{"instruction": "q", "response": "line\nbreak"}]', 1),
        ("instruction,response\nq,a", 1),
    ],
)
def test_invalid_json_names_its_line(write, content, line):
    message = refusal(write("rows.json", content))
    assert f"line {line}:" in message
    assert "invalid JSON" in message


def test_a_truncated_jsonl_file_names_its_last_line(write):
    row = '{"instruction": "q", "response": "a"}'
    message = refusal(write("rows.jsonl", f"{row}\n\n{row}\n{row[:-9]}"))
    assert "line 4:" in message
    assert "line 1" not in message


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_no_json_are_refused_with_their_line(write, constant):
    rows = ['{"instruction": "q", "response": "a"}', f'{{"instruction": "r", "response": {constant}}}']
    message = refusal(write("rows.jsonl", "\n".join(rows)))
    assert "line 2:" in message
    assert constant in message
    message = refusal(write("rows.json", "[\n" + ",\n".join(rows) + "\n]"))
    assert constant in message
    assert "line 1:" not in message  # it stands on line 3


def test_json_nested_too_deeply_is_refused(write):
    assert "nested too deeply" in refusal(write("rows.json", "[" * 200_000))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_endless_number_is_refused_and_no_traceback(write, suffix):
    content = '{"instruction": "q", "response": ' + "1" * 5000 + "}"
    message = refusal(write(f"rows{suffix}", f"[{content}]" if suffix == ".json" else content))
    assert len(message) < 400


@pytest.mark.parametrize(
    ("content", "found"),
    [("[1]", "1"), ('["text"]', '"text"'), ("[null]", "null"), ("[[1]]", "[1]")],
)
def test_a_row_that_is_no_object_is_refused_with_its_number(write, content, found):
    assert f"row 1: {found}, expected rows with an instruction and a response" in refusal(write("rows.json", content))
    assert f"row 2: {found}" in refusal(
        write("rows.jsonl", f'{{"instruction": "q", "response": "a"}}\n{content[1:-1]}')
    )


@pytest.mark.parametrize("content", ["5", '"text"', "null", "true"])
def test_json_that_is_neither_list_nor_object_is_refused(write, content):
    assert "expected a list of rows" in refusal(write("rows.json", content))


@pytest.mark.parametrize(
    "content",
    [
        '{"instruction": ["q", "r"], "response": ["a", "b"]}',
        '{"instruction": {"0": "q"}, "response": {"0": "a"}}',
        '{"instruction": "q", "response": "a"}',
        "{}",
    ],
)
def test_column_oriented_json_is_refused_and_told_what_is_expected(write, content):
    assert "expected a list of rows" in refusal(write("rows.json", content))


@pytest.mark.parametrize(
    ("rows", "line", "cells"),
    [("q,a,more\nr,b\n", 2, 3), ("q,a\nr\n", 3, 1), ('"two\nlines",a\nr,b,c\n', 4, 3), ("q,a\n\nr,b,\n", 4, 3)],
)
def test_a_ragged_csv_row_names_its_line_and_its_cells(write, rows, line, cells):
    message = refusal(write("rows.csv", f"instruction,response\n{rows}"))
    assert f"line {line}: {counted(cells, 'cell')}, expected 2" in message
    assert "instruction, response" in message


@pytest.mark.parametrize("rows", ['q,"a\nr,b\n', 'q,"a" b\nr,c\n'])
def test_an_unclosed_quote_is_refused_and_not_swallowed(write, rows):
    message = refusal(write("rows.csv", f"instruction,response\n{rows}"))
    assert "quote" in message
    assert "line " in message


def test_a_header_that_names_a_column_twice_is_refused(write):
    message = refusal(write("rows.csv", "instruction,response, response\nq,a,b\n"))
    assert "twice" in message


def test_blank_lines_before_the_csv_header_are_skipped(write):
    assert pairs(write("rows.csv", "\n\ninstruction;response\nq;a\n")) == [("q", "a")]


# ---- Formats ---------------------------------------------------------------------------------------------------------
def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_texts_are_read_exactly_and_null_inputs_are_allowed(tmp_path):
    rows = [{"instruction": f"{text} {i}", "input": None, "response": text} for i, text in enumerate(ODD_TEXTS)]
    path = parquet(tmp_path / "rows.parquet", rows)
    assert pairs(path) == [(row["instruction"], row["response"]) for row in rows]
    assert "Parquet (instruction, response, input)" in load_conversations(path)[1].line()


def test_parquet_messages_are_read_and_numbers_in_it_are_refused_with_their_row(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert pairs(parquet(tmp_path / "chat.parquet", [{"messages": turns}])) == [("q", "a")]
    rows = [{"instruction": "q", "response": None}, {"instruction": "q", "response": "a"}]
    assert "row 1, column 'response': null" in refusal(parquet(tmp_path / "null.parquet", rows))
    assert "row 1, column 'response': 7" in refusal(
        parquet(tmp_path / "number.parquet", [{"instruction": "q", "response": 7}])
    )
    day = datetime.date(2024, 1, 31)
    assert "2024-01-31" in refusal(parquet(tmp_path / "date.parquet", [{"instruction": "q", "response": day}]))


def test_many_row_groups_of_parquet_are_read_in_order(tmp_path):
    table = pyarrow.Table.from_pylist([{"instruction": f"q{i}", "response": "a"} for i in range(2500)])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=700)
    conversations, _ = load_conversations(tmp_path / "rows.parquet")
    assert [(number, messages[0]["content"]) for number, messages in conversations] == [
        (i + 1, f"q{i}") for i in range(2500)
    ]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("instruction|response\nq, or r|a\n", "separated by '|'"),
        ("sep=;\ninstruction;response\nq, or r;a\n", "separated by ';'"),
        ("\nsep=|\r\ninstruction|response\r\nq, or r|a\r\n", "separated by '|'"),
        ("'instruction','response'\n'q, or r','a'\n", "in ' quotes"),
        ("instruction,response\n'q, or r',a\n'q, or s',b\n", "in ' quotes"),
        ('instruction,response\r"q, or r",a\r', "CSV ("),
        ("id;note, or not;instruction;response\n1;x, y, z;q, or r;a\n", "separated by ';'"),
    ],
)
def test_delimiter_and_quotes_are_detected_and_named(write, content, note):
    path = write("rows.csv", content)
    assert pairs(path)[0] == ("q, or r", "a")
    assert note in load_conversations(path)[1].line()


@pytest.mark.parametrize("text", ["it's 'fine', isn't it", "'tis; so | it \t is"])
def test_quotes_and_delimiters_inside_texts_do_not_mislead_the_detection(write, text):
    path = write("rows.csv", f'instruction,response\n"{text}","{text}, a"\n"{text} b",c\n')
    assert pairs(path) == [(text, f"{text}, a"), (f"{text} b", "c")]


def test_a_mapped_header_decides_the_delimiter(write):
    path = write("rows.csv", "Frage, kurz;Antwort, lang, gut\nq;a\n")
    assert pairs(path, {"instruction": "Frage, kurz", "response": "Antwort, lang, gut"}) == [("q", "a")]


def test_a_ragged_row_and_an_open_quote_name_the_line_that_they_begin_in(write):
    assert "line 3: 3 cells" in refusal(write("ragged.csv", 'instruction,response\nq,a\n"two\nlines",b,c\n'))
    assert "line 4: invalid CSV (a quote is opened and never closed)" in refusal(
        write("open.csv", 'instruction,response\n"two\nlines",b\n"q,c\nr,d\ns,e\n')
    )
    assert "line 5: 3 cells" in refusal(write("sep.csv", "\nsep=;\ninstruction;response\nq;a\nr;b;c\n"))


def test_the_key_of_nested_rows_is_named(write):
    _, report = load_conversations(write("rows.json", f'{{"version": 2, "data": {JSON_ROWS}}}'))
    assert "JSON, rows under 'data'" in report.line()


def test_instances_become_a_row_each_with_the_shared_instruction(write):
    row = {"instruction": "Translate.", "instances": [{"input": "ja", "output": "yes"}, {"input": "", "output": "no"}]}
    path = write("rows.jsonl", json.dumps(row) + "\n" + json.dumps(row | {"id": 2, "instruction": "Say it."}))
    assert pairs(path) == [
        ("Translate.\n\nja", "yes"),
        ("Translate.", "no"),
        ("Say it.\n\nja", "yes"),
        ("Say it.", "no"),
    ]
    conversations, report = load_conversations(path)
    assert [number for number, _ in conversations] == [1, 1, 2, 2]
    assert report.rows == 4
    assert report.unused == ["id"]


@pytest.mark.parametrize("instances", [["x"], [None], [5]])
def test_instances_that_are_no_objects_are_refused(write, instances):
    rows = json.dumps([{"instruction": "q", "instances": instances}])
    assert "row 1, column 'instances'" in refusal(write("rows.json", rows))


def test_columns_that_are_not_used_are_named(write):
    rows = [{"instruction": "q", "response": "a", "category": "x"}, {"instruction": "r", "response": "b", "tools": "t"}]
    assert "not used: category, tools" in load_conversations(write("rows.json", json.dumps(rows)))[1].line()


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_text_beside_instruction_and_response_comes_first(write, column):
    rows = [{column: "Be brief.", "question": "q", "response": "a"}, {column: "", "question": "r", "response": "b"}]
    conversations, _ = load_conversations(write("rows.json", json.dumps(rows)))
    assert [[m["role"] for m in messages] for _, messages in conversations] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],
    ]


def test_a_blank_system_turn_is_left_out_and_a_developer_is_a_system(write):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": [{"role": role, "content": text}, *turns]} for role, text in (("system", " "), ("developer", "x"))
    ]
    conversations, report = load_conversations(write("rows.json", json.dumps(rows)))
    assert [messages[0]["role"] for _, messages in conversations] == ["user", "system"]
    assert report.count_dropped() == 0


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(write, tmp_path):
    cache, path = tmp_path / "cache", write("rows.json", JSON_ROWS)
    first, report = load_conversations(path, cache_dir=cache)
    built = [file.stat().st_mtime_ns for file in cache.glob("rows-*/*")]
    again, same_report = load_conversations(path, cache_dir=cache)
    assert [file.stat().st_mtime_ns for file in cache.glob("rows-*/*")] == built
    assert list(again) == list(first)
    assert same_report == report
    stamp = path.stat().st_mtime_ns
    path.write_text(JSON_ROWS.replace('"a"', '"b"'))  # of the same size and time
    os.utime(path, ns=(stamp, stamp))
    assert load_conversations(path, cache_dir=cache)[0][0][1][1]["content"] == "b"
    swapped = load_conversations(path, {"instruction": "response", "response": "instruction"}, cache)[0]
    assert [m["content"] for m in swapped[0][1]] == ["b", "q"]


def test_a_file_that_is_refused_leaves_nothing_in_the_cache(write, tmp_path):
    with pytest.raises(UserError):
        load_conversations(
            write("rows.json", '[{"instruction": "q", "response": "a"}, 5]'), cache_dir=tmp_path / "cache"
        )
    assert not (tmp_path / "cache").exists()


def test_a_large_jsonl_file_is_read_in_a_fraction_of_its_size(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f'{{"instruction": "q{i}", "response": "{"long answer " * 200}"}}\n' for i in range(10_000))
    tracemalloc.start()
    conversations, _ = load_conversations(path)
    assert len(list(conversations.select(range(9000, 9010)))) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20e6
    assert peak < 5e6


# ---- Values that are no text -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("column", ["instruction", "response", "input"])
@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": "b"}, "\ud800 half a pair"])
def test_a_value_that_is_no_text_is_refused_with_its_row_and_column(write, column, value):
    rows = [{"instruction": "q", "response": "a", "input": ""}, {"instruction": "r", "response": "b", "input": "i"}]
    rows[1][column] = value
    message = refusal(write("rows.json", json.dumps(rows)))
    assert "row 2, " in message
    assert repr(column) in message
    message.encode("utf-8")  # so that it can be printed and logged


@pytest.mark.parametrize("column", ["instruction", "response"])
def test_null_where_text_belongs_is_refused_with_its_row_and_column(write, column):
    rows = [{"instruction": "q", "response": "a"}, {"instruction": "r", "response": "b"} | {column: None}]
    message = refusal(write("rows.json", json.dumps(rows)))
    assert "row 2, " in message
    assert repr(column) in message
    assert "null" in message


def test_null_and_blank_inputs_are_allowed_and_add_nothing(write):
    rows = [{"instruction": f"q{i}", "response": "a", "input": extra} for i, extra in enumerate([None, "", " ", "x"])]
    del rows[1]["input"]
    found = pairs(write("rows.json", json.dumps(rows)))
    assert [prompt for prompt, _ in found] == ["q0", "q1", "q2", "q3\n\nx"]


def test_a_later_row_without_the_column_is_refused_with_what_it_has(write):
    rows = [{"instruction": "q", "response": "a"}, {"instruction": "r", "answer": "b"}]
    message = refusal(write("rows.json", json.dumps(rows)))
    assert "row 2: column 'response' is missing" in message
    assert "instruction, answer" in message


# ---- Columns ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("question", ["instruction", "prompt", "question", "Question", " PROMPT "])
@pytest.mark.parametrize("answer", ["response", "output", "answer", "completion", "Output"])
def test_the_usual_names_are_known_in_any_case(write, question, answer):
    assert pairs(write("rows.json", json.dumps([{"id": "1", question: "q", answer: "a"}]))) == [("q", "a")]


@pytest.mark.parametrize("extra", ["input", "context", "Context"])
def test_an_input_or_context_follows_the_instruction(write, extra):
    rows = [{extra: "the text", "instruction": "Translate.", "response": "a"}]
    assert pairs(write("rows.json", json.dumps(rows))) == [("Translate.\n\nthe text", "a")]


@pytest.mark.parametrize("content", ["q,a\n1,2\n", "instruction,reply\n1,2\n", "text,response\n1,2\n"])
def test_missing_columns_name_those_that_were_found(write, content):
    message = refusal(write("rows.csv", content))
    assert content.split("\n", 1)[0].replace(",", ", ") in message
    assert "--dataset_columns" in message


def test_column_names_with_line_breaks_do_not_break_the_message(write):
    refusal(write("rows.csv", '"a\nb",c\n1,2\n'))
    refusal(write("rows.json", json.dumps([{"a\r\nb": "1"}])))
    refusal(write("rows.csv", '"a\nb",c\n1,2,3\n'))
    refusal(write("rows.csv", '"a\nb","a\nb"\n1,2\n'))
    refusal(write("rows.json", json.dumps([{"a\nb": "1"}])), {"instruction": "q", "response": "a"})


def test_a_mapping_settles_unusual_names_and_wins_over_the_usual_ones(write):
    rows = [{"q": "what", "hint": "short", "a": "this", "instruction": "no", "response": "no"}]
    path = write("rows.json", json.dumps(rows))
    assert pairs(path, {"instruction": "q", "response": "a"}) == [("what", "this")]
    assert pairs(path, {"instruction": "q", "response": "a", "input": "hint"}) == [("what\n\nshort", "this")]


def test_a_mapping_may_name_the_column_of_messages(write):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert pairs(write("rows.json", json.dumps([{"chat": turns}])), {"messages": "chat"}) == [("q", "a")]


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        ({"instruction": "nope", "response": "response"}, "missing nope"),
        ({"instruction": "instruction"}, "instruction and response"),
        ({"messages": "nope"}, "missing nope"),
        ({"instruction": 5, "response": "response"}, "missing 5"),
        ({"instruction": "instruction", "response": "response", "inptu": "response"}, "expected the keys"),
        ({"instruction": ["instruction"], "response": "response"}, "instruction"),
        ({"instruction": {"a": "b"}, "response": "response"}, "instruction"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused_with_the_columns_found(write, mapping, named):
    message = refusal(write("rows.json", JSON_ROWS), mapping)
    assert "--dataset_columns" in message
    assert named in message
    assert "columns found: instruction, response" in message


def test_an_optional_input_that_the_first_row_lacks_is_kept_in_the_others(write):
    rows = [
        {"instruction": "How long?", "response": "30 days."},
        {"instruction": "Classify.", "input": "My order came broken.", "response": "A complaint."},
    ]
    for name, text in (("rows.json", json.dumps(rows)), ("rows.jsonl", "\n".join(map(json.dumps, rows)))):
        assert pairs(write(name, text)) == [
            ("How long?", "30 days."),
            ("Classify.\n\nMy order came broken.", "A complaint."),
        ]


def test_empty_columns_behind_the_last_are_ignored_but_a_comma_of_the_text_is_not(write):
    assert pairs(write("rows.csv", "instruction,response,,\nq,a,,\n")) == [("q", "a")]
    assert "3 cells, expected 2" in refusal(write("ragged.csv", "instruction,response\nq,yes,\n"))


def test_json_and_json_lines_under_each_others_name_are_told_apart(write):
    row = '{"instruction": "q", "response": "a"}'
    assert pairs(write("rows.json", f"{row}\n\n{row.replace('q', 'r')}\n")) == [("q", "a"), ("r", "a")]
    assert pairs(write("rows.jsonl", f"[\n{row}\n]")) == [("q", "a")]
    assert pairs(write("one.jsonl", row)) == [("q", "a")]
    assert "name it .json" in refusal(write("object.jsonl", '{\n"data": []\n}'))


# ---- Conversations ---------------------------------------------------------------------------------------------------
def test_openai_messages_are_kept_in_order_with_their_roles(write):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " q1"},
        {"role": "assistant", "content": "a1\n"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "a2"},
    ]
    conversations, report = load_conversations(write("rows.jsonl", json.dumps({"messages": turns})))
    assert list(conversations) == [(1, turns)]
    assert "messages" in report.line()


def test_sharegpt_speakers_become_roles_and_the_system_column_comes_first(write):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
        {"from": "observation", "value": "o"},
        {"from": "function_call", "value": "f"},
    ]
    rows = [{"system": "Be brief.", "conversations": turns}, {"system": " ", "conversations": turns[:2]}]
    conversations, _ = load_conversations(write("rows.json", json.dumps(rows)))
    assert [(m["role"], m["content"]) for m in conversations[0][1]] == [
        ("system", "Be brief."),
        ("user", "q"),
        ("assistant", "a"),
        ("tool", "o"),
        ("assistant", "f"),
    ]
    assert [m["role"] for m in conversations[1][1]] == ["user", "assistant"]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "wizard", "content": "x"},
        {"content": "x"},
        {"role": None, "content": "x"},
        {"role": ["user"], "content": "x"},
        {"role": {"name": "user"}, "content": "x"},
        "x",
        None,
        5,
    ],
)
def test_an_unknown_speaker_is_refused_with_row_and_message(write, turn):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    message = refusal(write("rows.json", json.dumps([{"messages": good}, {"messages": [*good, turn]}])))
    assert "row 2, message 3" in message
    assert "assistant" in message


@pytest.mark.parametrize("content", [None, 5, ["x", 5], [{"type": "image"}], "\udfff"])
def test_a_message_that_is_no_text_is_refused_with_row_and_message(write, content):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    assert "row 1, message 2" in refusal(write("rows.json", json.dumps([{"messages": turns}])))


@pytest.mark.parametrize("system", ["\ud800", 5, ["x"]])
def test_a_system_column_that_is_no_text_is_refused_with_its_row(write, system):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert "row 1" in refusal(write("rows.json", json.dumps([{"system": system, "conversations": turns}])))


@pytest.mark.parametrize("turns", [None, "text", {"role": "user"}, 5])
def test_messages_that_are_no_list_are_refused_with_row_and_column(write, turns):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    message = refusal(write("rows.jsonl", "\n".join(json.dumps({"messages": value}) for value in (good, turns))))
    assert "row 2, column 'messages'" in message


def test_conversations_without_an_answer_are_dropped_and_counted(write):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    blank = {"role": "assistant", "content": " \n"}
    rows = [{"messages": turns} for turns in ([user, answer], [user], [], [user, blank], [user, answer, user, blank])]
    conversations, report = load_conversations(write("rows.json", json.dumps(rows)))
    assert [number for number, _ in conversations] == [1]
    assert report.count_dropped() == 4


# ---- What the keys of a row mean -------------------------------------------------------------------------------------
QUESTION, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
STOCK = {"name": "stock", "parameters": {}}
CALL = {"type": "function", "function": {"name": "stock", "arguments": {"item": "lamp"}}}


def load_rows(write, *rows, **options):
    return load_conversations(write("rows.jsonl", "\n".join(map(json.dumps, rows))), **options)


def test_an_answer_of_weight_0_is_kept_as_context_and_counted(write):
    turns = [QUESTION, REPLY | {"weight": 0}, QUESTION, REPLY | {"weight": 1}]
    conversations, report = load_rows(write, {"messages": turns}, {"messages": turns[:2]})
    assert list(conversations) == [(1, [QUESTION, REPLY | {"weight": 0}, QUESTION, REPLY])]
    assert "1 dropped: every answer has weight 0 (row 2)" in report.line()
    assert "2 answers of weight 0 read but not trained" in report.line()


@pytest.mark.parametrize(
    ("column", "value"), [("weight", 0), ("weight", 0.0), ("train", False), ("trainable", "false")]
)
def test_a_row_that_is_not_to_be_learned_is_dropped_and_counted(write, column, value):
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "r", "output": "BAD", column: value}]
    conversations, report = load_rows(write, *rows, {"instruction": "s", "output": "b", column: 0.7})
    assert [number for number, _ in conversations] == [1, 3]
    assert f"1 dropped: {column} is {json.dumps(value)} (row 2)" in report.line()


@pytest.mark.parametrize("weight", [0.5, 2, -1, "abc", "none", "", [0], {}, 10**400])
def test_another_weight_of_an_answer_is_refused(write, weight):
    path = write("rows.json", json.dumps([{"messages": [QUESTION, REPLY | {"weight": weight}]}]))
    assert "row 1, message 2: weight" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value"), [("masked", True), ("mask", 0), ("skip", "yes"), ("label", False), ("kto_tag", "-1")]
)
def test_an_answer_that_may_not_be_meant_for_learning_is_refused(write, key, value):
    path = write("rows.json", json.dumps([{"messages": [QUESTION, REPLY | {key: value}]}]))
    assert f"row 1, message 2: {key}" in refusal(path)
    turns = [QUESTION | {key: value}, REPLY | {key: None, "label": 1}]
    assert len(load_rows(write, {"messages": turns})[0]) == 1


def test_questions_marked_to_be_trained_are_named(write):
    _, report = load_rows(write, {"messages": [QUESTION | {"weight": 1}, REPLY | {"weight": 1}]})
    assert "1 message of weight 1 not trained, being no answers" in report.line()


@pytest.mark.parametrize("value", ["abc", 0.5, 2, float("nan"), [0], {"a": 1}, "12 kg", 10**400, True])
@pytest.mark.parametrize("column", ["weight", "sample_weight", "Train", "label"])
def test_a_column_about_learning_is_named_whatever_stands_in_it(tmp_path, column, value):
    rows = [{"instruction": f"q{i}", "output": "a", column: given} for i, given in enumerate([value, value, 1])]
    path = tmp_path / "rows.parquet"
    if isinstance(value, (list, dict)) or value == 10**400:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
    else:
        rows = rows if not isinstance(value, (str, bool)) else [row | {column: str(row[column])} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    conversations, report = load_conversations(path)
    assert len(conversations) == 3
    assert f"(instruction, output, {column})" in report.line()
    odd = f"{column} not understood in rows 1, 2, such as"
    assert (odd in report.line()) == (value is not True)
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(rows[:2]).replace("NaN", "null"))
    if value is not True:
        assert f"not used: {column})" in load_conversations(path)[1].line()


@pytest.mark.parametrize("value", [-1, -0.5, "-2", float("-inf")])
def test_a_row_of_negative_weight_is_refused(tmp_path, value):
    path = tmp_path / "rows.parquet"
    rows = [{"instruction": "q", "output": "a", "weight": value}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert "row 1: weight is" in refusal(path)
    assert "no answer is unlearned here" in refusal(path)


def test_rows_without_a_weight_are_trained_and_rows_without_a_label_named(write):
    rows = "instruction,output,weight,label\nq,a,,\nr,b,0, TRUE \ns,c,1.0,1.0\nt,d, No ,good\n"
    conversations, report = load_conversations(write("rows.csv", rows))
    assert [number for number, _ in conversations] == [1, 3]
    assert 'label not understood in row 1, such as "", and read as if it were not there' in report.line()
    assert "weight not understood" not in report.line()
    assert "(instruction, output, weight, label)" in report.line()


def test_calls_and_tools_of_openai_its_first_format_and_sharegpt_are_one_conversation(write):
    arguments, result = json.dumps(CALL["function"]["arguments"]), '{"left": 3}'
    newest = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "stock", "arguments": arguments}}]},
        {"role": "tool", "content": result},
        REPLY,
    ]
    legacy = [
        QUESTION,
        {"role": "assistant", "content": "", "function_call": {"name": "stock", "arguments": arguments}},
        {"role": "function", "content": result},
        REPLY,
    ]
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps({"name": "stock", "arguments": {"item": "lamp"}})},
        {"from": "observation", "value": result},
        {"from": "gpt", "value": "a"},
    ]
    rows = [
        {"messages": newest, "tools": [{"type": "function", "function": STOCK}]},
        {"messages": legacy, "functions": [STOCK]},
        {"messages": sharegpt, "tools": json.dumps([STOCK])},
    ]
    conversations, report = load_rows(write, *rows)
    tools = [{"type": "function", "function": STOCK}]
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert list(conversations) == [(1, [QUESTION | {"tools": tools}, call, {"role": "tool", "content": result}, REPLY])]
    assert report.dropped == {"duplicate": {"count": 2, "rows": [2, 3]}}


def define(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def filled_up(value):
    """Rows as Arrow gives them back: each object has the keys of all objects in its place."""
    return pyarrow.Table.from_pylist(value).to_pylist()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_what_arrow_fills_up_with_null_is_not_there(suffix, tmp_path):
    text, number = {"type": "string"}, {"type": "integer", "enum": [1, 2]}
    shapes = [("f", {"item": "lamp"}, {"item": text}), ("g", {"count": 2}, {"count": number})]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{index}"},
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
                },
                {"role": "tool", "content": '{"left": null}'},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [define(name, **properties)],
        }
        for index, (name, arguments, properties) in enumerate(shapes)
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in filled_up(rows)))
    conversations, report = load_conversations(path)
    for (name, arguments, properties), (_, messages) in zip(shapes, conversations, strict=True):
        assert messages[0]["tools"] == [define(name, **properties)]
        assert messages[1]["tool_calls"][0]["function"] == {"name": name, "arguments": arguments}
        assert messages[2]["content"] == '{"left": null}'
    assert not report.unused_keys


def test_null_that_says_something_in_a_call_or_a_tool_stays(write):
    tool = define("f", item={"type": ["string", "null"], "default": None}, kind={"enum": ["a", None]})
    call = {"name": "f", "arguments": {"item": None, "kind": "a"}}
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]
    ((_, messages),) = load_conversations(write("rows.json", json.dumps([{"conversations": turns, "tools": [tool]}])))[
        0
    ]
    assert messages[0]["tools"] == [tool]
    assert messages[1]["tool_calls"][0]["function"] == call


def test_a_map_of_parquet_is_an_object(tmp_path):
    kind = pyarrow.struct([("name", pyarrow.string()), ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))])
    turns = [{"role": "user", "content": "q", "tool_calls": []}]
    turns += [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": [("item", "lamp")]}]}]
    turn = pyarrow.struct(
        [("role", pyarrow.string()), ("content", pyarrow.string()), ("tool_calls", pyarrow.list_(kind))]
    )
    table = pyarrow.table({"messages": pyarrow.array([turns], pyarrow.list_(turn))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((_, messages),) = load_conversations(tmp_path / "rows.parquet")[0]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"item": "lamp"}}


def test_the_same_conversation_with_other_tools_is_no_duplicate(write):
    rows = [{"messages": [QUESTION, REPLY], "tools": [STOCK | {"name": name}]} for name in ("stock", "price")]
    assert len(load_rows(write, *rows)[0]) == 2


def test_conversations_with_tools_are_read_again_as_they_were_stored(write, tmp_path):
    turns = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, REPLY | {"reasoning_content": "so"}]
    conversations, _ = load_rows(write, {"messages": turns, "tools": [STOCK]})
    path = tmp_path / "stored.jsonl"
    data_utils.store_conversations(path, conversations)
    assert list(load_conversations(path, number_column="row")[0]) == list(conversations)


def test_answers_labelled_false_are_refused_or_left_out(write):
    rows = [
        {"messages": [QUESTION, REPLY | {"content": text}], "label": good} for text, good in (("a", True), ("b", False))
    ]
    path = write("rows.json", json.dumps(rows))
    assert "row 2: label is false" in refusal(path)
    conversations, report = load_conversations(path, chosen_only=True)
    assert [number for number, _ in conversations] == [1]
    assert "1 dropped: label is false (row 2)" in report.line()
    assert report.left_out == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [QUESTION], "chosen": REPLY, "rejected": {"role": "assistant", "content": "b"}},
        {"prompt": "q", "chosen": [QUESTION, REPLY], "rejected": [QUESTION, {"role": "assistant", "content": "b"}]},
    ],
)
def test_preferences_are_refused_or_only_the_chosen_answer_is_read(write, row):
    path = write("rows.json", json.dumps([row]))
    assert "--chosen_only true" in refusal(path)
    conversations, report = load_conversations(path, chosen_only=True)
    assert list(conversations) == [(1, [QUESTION, REPLY])]
    assert f"not used: {'prompt, ' if isinstance(row['chosen'], list) else ''}rejected)" in report.line()


@pytest.mark.parametrize("chosen", [None, 7, [], True, [[]], ["a"], {}, {"text": "a"}])
def test_a_chosen_answer_that_is_none_is_one_line(write, chosen):
    path = write("rows.json", json.dumps([{"prompt": "q", "Chosen": chosen, "Rejected": "b"}]))
    with pytest.raises(UserError, match=r"row 1(, message 1|, column 'Chosen'): .* expected") as caught:
        load_conversations(path, chosen_only=True)
    one_line(str(caught.value))


def test_messages_in_cells_of_a_table_are_messages(write):
    cells = [[QUESTION], [REPLY], {"role": "assistant", "content": "b"}]
    cells = ['"' + json.dumps(cell).replace('"', '""') + '"' for cell in cells]
    path = write("rows.csv", "prompt,chosen,rejected\n" + ",".join(cells))
    assert list(load_conversations(path, chosen_only=True)[0]) == [(1, [QUESTION, REPLY])]
    assert pairs(write("trl.csv", "prompt,completion\n" + ",".join(cells[:2]))) == [("q", "a")]
    conversations, _ = load_rows(write, {"prompt": "q", "completion": [REPLY]})
    assert list(conversations) == [(1, [QUESTION, REPLY])]
    text = '[{"role": "admin", "content": "x"}]'
    assert pairs(write("rows.json", json.dumps([{"instruction": text, "output": text}]))) == [(text, text)]


def test_a_prompt_and_a_completion_may_be_lists_of_messages(write):
    briefly = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [briefly, QUESTION], "completion": [REPLY]}, {"prompt": [QUESTION], "completion": "a"}]
    conversations, report = load_rows(write, *rows)
    assert [messages for _, messages in conversations] == [[briefly, QUESTION, REPLY], [QUESTION, REPLY]]
    assert "(prompt, completion)" in report.line()


def test_the_turns_of_a_history_come_before_the_instruction(write):
    before = {"history": [["first", "yes"]], "instruction": "q", "output": "a"}
    conversations, report = load_rows(write, before, {"history": [], "instruction": "r", "output": "b"})
    first = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"}]
    assert conversations[0][1] == [*first, QUESTION, REPLY]
    assert "(instruction, output, history)" in report.line()
    message = refusal(write("bad.json", json.dumps([before | {"history": [["first"]]}])))
    assert "row 1, column 'history': expected a list of pairs" in message


@pytest.mark.parametrize("column", ["reasoning", "reasoning_content", "thinking"])
def test_a_column_of_reasoning_is_the_thought_before_the_answer(write, column):
    conversations, report = load_rows(write, {"instruction": "q", "output": "a", column: "I count."})
    assert conversations[0][1] == [QUESTION, REPLY | {"reasoning_content": "I count."}]
    assert (report.thoughts, report.reasoning) == (1, 1)
    assert f"(instruction, output, {column})" in report.line()


def test_each_column_is_named_as_read_or_as_not_used(write):
    row = {"id": "1", "instruction": "q", "input": "i", "system": "s", "output": "a", "History": '[["r", "b"]]'}
    row |= {"tools": [STOCK], "thinking": "so", "label": True, "functions": "hammer", "reasoning": "", "topic": "x"}
    _, report = load_rows(write, row, {"instruction": "r", "output": "b", "thinking": ["so"], "History": "long ago"})
    read = (
        "instruction, output, input, system, History, tools, thinking, label; not used: id, functions, reasoning, topic"
    )
    assert f"({read})" in report.line()
    assert 'History not understood in row 2, such as "long ago"' in report.line()
    assert 'thinking not understood in row 2, such as ["so"]' in report.line()
    _, report = load_rows(write, {"messages": [QUESTION, REPLY], "tools": json.dumps([STOCK]), "source": "x"})
    assert "(messages, tools; not used: source)" in report.line()
    _, report = load_rows(write, {"instruction": "q", "instances": [{"input": "i", "output": "a"}], "name": "x"})
    assert "(instruction, output, input, instances; not used: name)" in report.line()


def test_unusual_names_of_conversations_are_advised_and_answers_that_were_rejected_never(write):
    message = refusal(write("rows.json", json.dumps([{"dialog": [QUESTION, REPLY]}])))
    assert """--dataset_columns '{"messages": "dialog"}'""" in message
    assert "--dataset_columns" not in refusal(write("bad.json", json.dumps([{"prompt": "q", "rejected": "b"}])))
    assert "a text that is no JSON" in refusal(write("rows.csv", "messages\n\"[{'role': 'user'}]\"\n"))


@pytest.mark.parametrize("key", ["images", "videos", "audio"])
def test_pictures_films_and_sounds_are_refused_by_name(write, key):
    rows = [{"messages": [QUESTION, REPLY], key: []}, {"messages": [QUESTION, REPLY], key: ["file"]}]
    assert f"row 2: {key} beside the text" in refusal(write("rows.json", json.dumps(rows)))
    part = {"role": "user", "content": [{"type": "image_url"}]}
    assert "part of type image_url" in refusal(write("parts.json", json.dumps([{"messages": [part, REPLY]}])))


def test_the_texts_of_parts_are_joined_and_unknown_keys_of_messages_named(write):
    parts = {"role": "user", "content": [{"type": "text", "text": "q1"}, {"type": "text", "text": "q2"}], "mood": "x"}
    conversations, report = load_rows(write, {"messages": [parts, REPLY]})
    assert conversations[0][1][0] == {"role": "user", "content": "q1\nq2"}
    assert "not used in messages: mood" in report.line()


# ---- Counts ----------------------------------------------------------------------------------------------------------
def test_blank_answers_and_instructions_are_dropped_and_counted_with_the_first_row(write):
    path = write("rows.csv", "instruction,response\nq,a\nr,\ns,  \n ,b\nt,c\n")
    conversations, report = load_conversations(path)
    assert [number for number, _ in conversations] == [1, 5]
    assert (report.rows, report.kept, report.count_dropped()) == (5, 2, 3)
    line = report.line()
    assert "5 rows, 2 kept, 3 dropped: an empty text (rows 2, 3, 4)" in line


def test_duplicates_are_dropped_and_counted_and_near_duplicates_kept(write):
    path = write("rows.csv", "instruction,response\nq,a\nq,b\nq,a\nq ,a\nq,a\n")
    conversations, report = load_conversations(path)
    assert [number for number, _ in conversations] == [1, 2, 4]
    assert (report.rows, report.kept) == (5, 3)
    assert report.dropped == {"duplicate": {"count": 2, "rows": [3, 5]}}
    assert "2 dropped: duplicate (rows 3, 5)" in report.line()


def test_a_file_that_grows_while_it_is_read_is_refused_and_leaves_nothing(write, tmp_path, monkeypatch):
    path, read = write("rows.jsonl", '{"instruction": "q", "response": "a"}\n'), data_utils.read_conversations

    def appending(*args):
        yield from read(*args)
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"instruction": "p", "response": "b"}\n')

    monkeypatch.setattr(data_utils, "read_conversations", appending)
    with pytest.raises(UserError, match="was changed while it was read; try again once it is whole"):
        load_conversations(path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_small_file_that_repeats_a_long_row_fills_no_disk(tmp_path):
    path = parquet(tmp_path / "rows.parquet", [{"instruction": "Say it", "response": "a word " * 1000}] * 1000)
    conversations, report = load_conversations(str(path), cache_dir=tmp_path / "cache")
    assert (len(conversations), report.dropped["duplicate"]["count"]) == (1, 999)
    written = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert written < 20_000  # of 7 MB


def test_duplicates_are_found_across_formats_of_the_same_conversation(write):
    openai = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    named = [{"content": "q", "role": "user", "id": 1}, {"from": "gpt", "value": "a"}]
    _, report = load_conversations(write("rows.json", json.dumps([{"messages": openai}, {"messages": named}])))
    assert report.dropped == {"duplicate": {"count": 1, "rows": [2]}}


def test_a_file_of_dropped_rows_only_is_an_error_with_the_counts(write):
    message = refusal(write("rows.csv", "instruction,response\nq,\nr,\n"))
    assert "2 rows, 0 kept, 2 dropped" in message


# ---- Splitting -------------------------------------------------------------------------------------------------------
def store(conversations, folder):
    """Conversations of [(row number, messages), ...] in a file of their own."""
    return data_utils.store_conversations(Path(folder) / f"{len(list(Path(folder).iterdir()))}.jsonl", conversations)


@pytest.fixture
def numbered(tmp_path):
    """numbered(3) -> Conversations of rows 1, 2, 3 with the questions q0, q1, q2."""
    return lambda count: store(enumerate(rows_of(*(f"q{i}" for i in range(count))), start=1), tmp_path)


@given(count=st.integers(2, 40), share=st.floats(0.01, 0.6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_split_is_seeded_disjoint_and_complete(count, share, seed):
    with tempfile.TemporaryDirectory() as folder:
        rows = store(enumerate(rows_of(*(f"q{i}" for i in range(count))), start=1), folder)
        try:
            train, validation = data_utils.split_conversations(rows, share, seed)
        except UserError:
            assert round(count * share) >= count
            return
        assert sorted(number for number, _ in [*train, *validation]) == list(range(1, count + 1))
        assert all(messages[0]["content"] == f"q{number - 1}" for number, messages in [*train, *validation])
        assert train
        assert len(validation) == max(1, round(count * share))
        again = data_utils.split_conversations(rows, share, seed)
        assert [list(part) for part in again] == [list(train), list(validation)]


def test_another_seed_splits_otherwise_and_the_rows_are_shuffled(numbered):
    first, second = (list(data_utils.split_conversations(numbered(40), 0.2, seed)[0]) for seed in (1, 2))
    assert first != second
    assert [number for number, _ in first] != sorted(number for number, _ in first)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_one_row_cannot_be_split_and_the_remedy_is_named(numbered, share):
    with pytest.raises(UserError) as caught:
        data_utils.split_conversations(numbered(1), share, 42)
    assert "--validation_split 0" in one_line(str(caught.value))


def test_a_split_of_zero_holds_nothing_out(numbered):
    train, validation = data_utils.split_conversations(numbered(5), 0, 42)
    assert list(validation) == []
    assert sorted(number for number, _ in train) == [1, 2, 3, 4, 5]


def test_training_rows_of_the_validation_file_are_dropped_and_announced(numbered, tmp_path, capsys):
    validation = store([(9, rows_of("q1")[0]), (10, rows_of("q8")[0])], tmp_path)
    kept = data_utils.remove_overlap(numbered(3), validation)
    assert [number for number, _ in kept] == [1, 3]
    assert capsys.readouterr().err.startswith("1 training row")


def test_no_overlap_is_no_message(numbered, capsys):
    rows = numbered(9)
    assert list(data_utils.remove_overlap(rows.select([0, 1, 2]), rows.select([5, 6]))) == rows[:3]
    assert capsys.readouterr().err == ""


def test_training_rows_that_all_stand_in_the_validation_file_are_an_error(numbered):
    with pytest.raises(UserError) as caught:
        data_utils.remove_overlap(numbered(2), numbered(3))
    one_line(str(caught.value))


def test_conversations_are_read_by_position_slice_and_mask(numbered):
    rows = numbered(5)
    assert rows[-1] == rows[4] == list(rows)[4]
    assert [number for number, _ in rows[1:3]] == [2, 3]
    assert [number for number, _ in rows.select([3, 0])] == [4, 1]
    assert [number for number, _ in rows.select([True, False, False, True, False])] == [1, 4]
    assert len(rows.select([])) == 0
    with pytest.raises(IndexError):
        rows[5]


def test_prompts_are_compared_without_case_and_white_space_and_answers_by_their_words(tmp_path):
    long = "one two three four five six seven eight nine"
    texts = [
        ("What  is\nit?", long),
        ("what is it?", f"one two three four {long}"),
        ("What is that?", "yes"),
        ("x", "yes "),
    ]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    index = store(enumerate(rows), tmp_path).index
    assert index["prompt"][0] == index["prompt"][1] != index["prompt"][2]
    assert index["opening"][0] == index["opening"][1] != 0
    assert index["closing"][0] == index["closing"][1] != index["opening"][0]
    assert index["answer"][2] == index["answer"][3] != index["answer"][0]
    assert index["opening"][2] == index["closing"][2] == 0


# ---- Round trip and fuzzing ------------------------------------------------------------------------------------------
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
ANSWER = TEXT.filter(str.strip)


@given(st.lists(st.tuples(TEXT, ANSWER, st.sampled_from(["user", "system", "tool"])), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_written_conversations_are_read_back_as_they_were(texts):
    rows = [[{"role": role, "content": q}, {"role": "assistant", "content": a}] for q, a, role in texts]
    distinct = [row for index, row in enumerate(rows) if row not in rows[:index]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "validation.jsonl"
        data_utils.store_conversations(path, [(index * 7, row) for index, row in enumerate(distinct)])
        conversations, report = load_conversations(path, number_column="row")
        assert list(conversations) == [(index * 7, row) for index, row in enumerate(distinct)]
    assert not report.dropped


def load_or_refuse(name, content):
    """What every file must end in: a valid result, or a UserError of one line; anything else fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            conversations, report = load_conversations(path)
        except UserError as error:
            one_line(str(error))
            return
    assert 0 < report.kept == len(conversations)
    assert report.kept + report.count_dropped() == report.rows
    for _, messages in conversations:
        assert any(message["role"] == "assistant" for message in messages)
        for message in messages:
            assert message["role"] in {"user", "assistant", "system", "tool"}
            message["content"].encode("utf-8")


KEYS = st.sampled_from(
    ["instruction", "response", "input", "messages", "conversations", "role", "content", "from", "value", "system"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["user", "assistant", "gpt", "human", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(st.fixed_dictionaries({"role": VALUES | st.just("assistant"), "content": VALUES}), max_size=3)
ROWS = st.lists(
    st.fixed_dictionaries({"instruction": st.text(max_size=3), "response": st.text(max_size=3)})
    | st.fixed_dictionaries({"messages": TURNS, "system": VALUES})
    | st.dictionaries(KEYS, VALUES, max_size=3),
    min_size=1,
    max_size=3,
)
FUZZ = settings(max_examples=100, deadline=None, derandomize=True)


@given(st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]), st.binary(max_size=60))
@FUZZ
def test_random_bytes_end_in_one_line_or_in_rows(suffix, content):
    load_or_refuse(f"rows{suffix}", content)


@given(VALUES | ROWS, st.booleans())
@FUZZ
def test_random_json_ends_in_one_line_or_in_rows(value, ascii_only):
    content = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    load_or_refuse("rows.json", content)
    lines = value if isinstance(value, list) else [value]
    load_or_refuse("rows.jsonl", b"\n".join(json.dumps(line).encode() for line in lines))


CSV_PIECES = st.sampled_from(
    ["instruction", "response", "input", "messages", ",", ";", "\t", '"', '""', "\n", "\r\n", "\r", "\x00", " ", "é"]
)


@given(st.booleans(), st.lists(CSV_PIECES | st.text(max_size=3), max_size=20).map("".join))
@FUZZ
def test_random_csv_ends_in_one_line_or_in_rows(with_header, text):
    header = "instruction,response\n" if with_header else ""
    load_or_refuse("rows.csv", (header + text).encode("utf-8", "surrogatepass"))


@given(ROWS, st.integers(0, 400), st.binary(min_size=1, max_size=8))
@FUZZ
def test_parquet_with_random_bytes_in_it_ends_in_one_line_or_in_rows(rows, place, noise):
    try:
        table = pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):  # no Parquet file can hold such rows
        return
    buffer = io.BytesIO()
    try:
        pyarrow.parquet.write_table(table, buffer)
    except pyarrow.ArrowException:
        return
    content = bytearray(buffer.getvalue())
    load_or_refuse("rows.parquet", bytes(content))
    place %= len(content)
    content[place : place + len(noise)] = noise
    load_or_refuse("rows.parquet", bytes(content))


# ---- Whole texts, one conversation, other names ----------------------------------------------------------------------
def messages_of(path, **options):
    return [messages for _, messages in load_conversations(path, **options)[0]]


def test_a_column_text_is_read_as_whole_texts_and_announced(write):
    rows = [{"text": "The lamp.", "url": "x", "id": 1}, {"text": " "}]
    path = write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    whole = [[{"role": "text", "content": "The lamp."}]]
    assert messages_of(path) == whole
    line = load_conversations(path)[1].line()
    assert "whole texts: every token is trained" in line
    assert "not used: url, id" in line
    assert messages_of(write("b.json", '[{"body": "The lamp."}]'), mapping={"text": "body"}) == whole
    kept = write("validation.jsonl", json.dumps({"row": 7, "messages": whole[0]}))
    assert load_conversations(kept, number_column="row")[0][0] == (7, whole[0])


def test_a_text_beside_a_column_that_may_be_its_answer_is_not_guessed_at(write):
    message = refusal(write("rows.csv", "text,label\nfine,good\n"))
    assert """--dataset_columns '{"instruction": "text", "response": "label"}'""" in message
    assert """--dataset_columns '{"text": "text"}' trains on whole texts""" in message


@pytest.mark.parametrize(
    "content",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"id": "1", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]],
    ],
)
def test_one_conversation_and_bare_lists_of_turns_are_read(write, content):
    assert pairs(write("rows.json", json.dumps(content, indent=1))) == [("q", "a")]


@pytest.mark.parametrize(
    ("found", "guess"),
    [
        (["frage", "antwort"], {"instruction": "frage", "response": "antwort"}),
        (["id", "reply", "question text"], {"instruction": "question text", "response": "reply"}),
        (["a", "b"], {"instruction": "a", "response": "b"}),
    ],
)
def test_columns_that_are_not_known_are_answered_with_the_flag_to_paste(write, found, guess):
    message = refusal(write("rows.json", json.dumps([dict.fromkeys(found, "x")])))
    pasted = message.split("name yours, if these are meant: ")[1]
    flag, value = shlex.split(pasted)
    assert flag == "--dataset_columns"
    assert json.loads(value) == guess


def test_the_pasted_command_is_the_running_one_with_its_columns(write, monkeypatch):
    given = [
        "train.py",
        "--lora_r",
        "8",
        "--dataset_columns",
        '{"instruction": "x"}',
        "--custom_dataset_path",
        "it's.json",
    ]
    monkeypatch.setattr(sys, "argv", given)
    pasted = refusal(write("rows.json", '[{"frage": "q", "antwort": "a"}]')).split("meant: ")[1]
    columns = '{"instruction": "frage", "response": "antwort"}'
    assert shlex.split(pasted) == ["python", *given[:3], *given[5:], "--dataset_columns", columns]


def test_a_validation_file_may_have_the_usual_names_in_place_of_the_mapped_ones(write):
    usual, odd = write("usual.json", JSON_ROWS), write("odd.json", '[{"q": "q", "a": "a"}]')
    mapping = {"instruction": "q", "response": "a"}
    assert messages_of(usual, mapping=mapping, or_usual_names=True) == messages_of(odd, mapping=mapping)
    assert messages_of(odd, mapping=mapping, or_usual_names=True) == messages_of(odd, mapping=mapping)
    half = write("half.json", '[{"q": "q", "response": "a"}]')
    with pytest.raises(UserError, match="missing a"):
        load_conversations(half, mapping, or_usual_names=True)
    with pytest.raises(UserError, match=r"missing [qa], [qa]"):
        load_conversations(usual, mapping)


# ---- Files that are not what their name says -------------------------------------------------------------------------
def test_an_unclosed_double_quote_is_not_read_as_single_quoted_csv(write):
    text = "instruction,response\n\"What is this,An answer\nIt's mine,it's yours\nq,'tis\n"
    assert "line 2: invalid CSV (a quote is opened and never closed)" in refusal(write("rows.csv", text))
    mixed = 'instruction,response\n"What, is this","An answer"\n\'q\',r\n"s,t\n'
    assert "a quote is opened and never closed" in refusal(write("mixed.csv", mixed))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_single_quotes_around_cells_are_taken_off(write, delimiter):
    lines = ["instruction{d}response", "'a{d} b'{d}'it''s'", "'c'{d}'d'"]
    text = "\n".join(lines).format(d=delimiter) + "\n"
    assert pairs(write("rows.csv", text)) == [(f"a{delimiter} b", "it's"), ("c", "d")]


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PK\x03\x04\n", "a zip archive or a spreadsheet"),
        (b"\x1f\x8b\x08", "packed by gzip"),
        (b"PAR1", "a Parquet file"),
    ],
)
def test_a_file_of_another_kind_is_named(write, name, start, kind):
    assert kind in refusal(write(name, start + b"\x00\xff\n"))


# ---- What people write beside and inside messages --------------------------------------------------------------------
def turns_of(write, *turns, **columns):
    row = {"messages": [{"role": "user", "content": "q"}, *turns, {"role": "assistant", "content": "r"}]} | columns
    return messages_of(write("rows.jsonl", json.dumps(row)))[0]


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training", "trainable"])
@pytest.mark.parametrize(("value", "weight"), [(0, 0), (False, 0), (1, None), (True, None), (None, None), (1.0, None)])
def test_an_answer_that_is_not_to_be_learned_is_context_only_whatever_the_key(write, key, value, weight):
    draft = {"role": "assistant", "content": "DRAFT", key: value}
    assert turns_of(write, draft)[1].get("weight") == weight


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
def test_the_arguments_of_a_call_are_read_under_each_of_their_names(write, key):
    call = {"name": "f", key: {"a": 1}}
    for calls in ([call], call, [{"type": "function", "function": call}], json.dumps([call | {key: '{"a": 1}'}])):
        found = turns_of(write, {"role": "assistant", "content": None, "tool_calls": calls})[1]["tool_calls"]
        assert found == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    with pytest.raises(UserError, match="of f, expected arguments alone"):
        turns_of(write, {"role": "assistant", "tool_calls": [call | {"parameters": {"b": 2}, "arguments": {"c": 3}}]})


def test_blanks_before_the_quotes_of_a_csv_file_are_no_part_of_its_texts(write):
    path = write("rows.csv", 'instruction, output\n"q", "a, b"\n"r", "c ""d"" "\n')
    assert pairs(path) == [("q", "a, b"), ("r", 'c "d" ')]
    assert load_conversations(path)[1].format == 'CSV in " quotes behind blanks'
    assert pairs(write("plain.csv", 'instruction,output\nq, a\n"r","b"\n')) == [("q", " a"), ("r", "b")]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"messages": [QUESTION | {"tool_calls": [CALL]}, REPLY]}], "message 1: a call of a tool by the user"),
        ([{"messages": [QUESTION, REPLY]}, {"text": "x"}], "row 2: column 'messages' is missing; columns found: text"),
        (
            [{"messages": [{"speaker": "user", "text": "q"}]}],
            "message 1: no role such as user or assistant; keys found: speaker, text",
        ),
    ],
)
def test_what_a_row_lacks_is_said_as_it_is(write, rows, line):
    assert line in refusal(write("rows.jsonl", "\n".join(map(json.dumps, rows))))


def test_what_stands_for_nothing_is_left_out_and_what_stands_twice_is_named(write, tmp_path):
    table = pyarrow.Table.from_pylist([{"instruction": "q", "input": float("nan"), "output": "a"}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert pairs(tmp_path / "rows.parquet") == [("q", "a")]
    turns = [{"role": "system", "content": None}, QUESTION | {"from": "human", "value": "other"}, REPLY]
    conversations, report = load_rows(write, {"messages": turns})
    assert list(conversations) == [(1, [QUESTION, REPLY])]
    assert "not used in messages: from, value" in report.line()
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "r", "output": "b", "input": "i", "system": "s"}]
    assert "(instruction, output, input, system)" in load_rows(write, *rows)[1].line()
    before = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]
    conversations, _ = load_rows(write, rows[0] | {"history": before})
    assert conversations[0][1] == [*before, QUESTION, REPLY]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_read_under_each_of_its_names(write, key):
    assert turns_of(write, {"role": "assistant", "content": "a", key: "I count."})[1]["reasoning_content"] == "I count."


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([{"type": "input_text", "text": "a"}], "a"),
        ({"type": "text", "text": "a"}, "a"),
        (["a", "b"], "a\nb"),
    ],
)
def test_text_parts_of_each_kind_are_joined(write, content, text):
    assert turns_of(write, {"role": "user", "content": content})[1]["content"] == text


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "I count."},
        {"type": "thinking", "thinking": [{"type": "text", "text": "I count."}]},
        {"type": "reasoning", "text": "I count."},
    ],
)
def test_a_part_of_an_answer_may_be_its_thought(write, part):
    said = {"role": "assistant", "content": [part, {"type": "text", "text": "a"}]}
    assert turns_of(write, said)[1] == {"role": "assistant", "content": "a", "reasoning_content": "I count."}
    with pytest.raises(UserError, match=r"a part of type (thinking|reasoning), expected texts only"):
        turns_of(write, {"role": "user", "content": [part]})


@pytest.mark.parametrize("content", [{"left": 3}, [{"left": 3}], 3, [1, "é"]])
def test_what_a_tool_returns_may_be_any_json_and_a_users_text_may_not(write, content):
    assert json.loads(turns_of(write, {"role": "tool", "content": content})[1]["content"]) == content
    with pytest.raises(UserError, match="is no text"):
        turns_of(write, {"role": "user", "content": content})


@pytest.mark.parametrize(
    ("speaker", "role"), [("USER", "user"), ("Chatbot", "assistant"), ("ipython", "tool"), ("prompter", "user")]
)
def test_speakers_are_known_in_any_case(write, speaker, role):
    assert turns_of(write, {"role": speaker, "content": "a"})[1]["role"] == role


def test_messages_may_stand_in_a_table_as_json(write):
    cell = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]).replace('"', '""')
    assert pairs(write("rows.csv", f'messages\n"{cell}"\n')) == [("q", "a")]


def test_a_system_text_is_not_read_twice(write):
    system = {"role": "system", "content": "Be brief."}
    rows = write("rows.json", json.dumps([{"messages": [system, {"role": "user", "content": "q"}]}]))
    assert "no answer" in refusal(rows)
    own = {"messages": [system, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write("rows.jsonl", json.dumps(own | {"system": "Be brief."}))
    assert [message["role"] for message in messages_of(path)[0]] == ["system", "user", "assistant"]
    assert "another in the messages" in refusal(write("two.jsonl", json.dumps(own | {"system": "Be long."})))


@pytest.mark.parametrize("label", [0, False, "0", "false", "undesirable", "rejected", -1, 0.0, " False "])
def test_an_answer_that_is_labelled_bad_is_never_trained(write, label):
    rows = [
        {"prompt": "q", "completion": "good", "label": {0: 1, "0": "1"}.get(label, True)},
        {"prompt": "r", "completion": "BAD", "label": label},
    ]
    path = write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert f"row 2: label is {json.dumps(label)}, so its answer would be trained as a good one" in refusal(path)
    assert [messages[1]["content"] for messages in messages_of(path, chosen_only=True)] == ["good"]


def test_input_and_output_alone_are_a_question_and_its_answer(write):
    assert pairs(write("a.json", '[{"input": "q", "output": "a"}]')) == [("q", "a")]
    assert pairs(write("b.json", '[{"instruction": "", "input": "q", "output": "a"}]')) == [("q", "a")]


# ---- Shapes of published data sets -----------------------------------------------------------------------------------
def only(path, **options):
    """The one conversation of a file, each message as (role, content), and its report."""
    conversations, report = load_conversations(path, **options)
    ((_, messages),) = conversations
    return [(message["role"], message["content"]) for message in messages], report


@pytest.mark.parametrize(
    "turns",
    [
        [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}],
        [{"human": "q", "assistant": "a"}, {"role": "user", "content": "r"}, {"role": "ai", "content": "b"}],
        {"from": ["human", "gpt", "human", "gpt"], "value": ["q", "a", "r", "b"]},
    ],
)
def test_turns_in_pairs_and_in_columns_are_turns(write, turns):
    found, _ = only(write("rows.json", json.dumps([{"conversation": turns}])))
    assert found == [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]


def test_a_worse_answer_beside_the_others_is_never_ignored(write):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write("rows.json", json.dumps([{"messages": turns, "Rejected_response": "BAD"}]))
    assert "a column Rejected_response, so these are preferences; add --chosen_only true" in refusal(path)
    found, report = only(path, chosen_only=True)
    assert found == [("user", "q"), ("assistant", "a")]
    assert report.unused == ["Rejected_response"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "text": "a"}],
            "a message a row, in the column content",
        ),
        ([{"message_id": 1, "text": "q", "role": "prompter"}], "a message a row, in the column text"),
        ([{"messages": "[{'role': 'user', 'content': 'q'}]"}], "if it is Python's form of one, write it by json.dumps"),
    ],
)
def test_rows_that_are_no_conversations_are_refused_with_the_remedy(write, rows, reason):
    assert reason in refusal(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"training_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "parts of this answer"),
        ({"channel": "analysis"}, "of channel analysis, which is a thought; give it as reasoning_content"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}, "half of a surrogate pair"),
        ({"tools": [{"name": "f", "description": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_what_a_message_says_of_itself_is_refused_where_it_cannot_be_obeyed(write, keys, reason):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | keys]
    assert reason in refusal(write("rows.json", json.dumps([{"messages": turns}])))


def test_a_column_that_says_whether_there_are_thoughts_is_no_thought(write):
    rows = [{"instruction": "q", "response": "a", "reasoning": "on"}]
    conversations, report = load_conversations(write("rows.json", json.dumps(rows)))
    assert "reasoning_content" not in conversations[0][1][-1]
    assert report.unused == ["reasoning"]


def test_tools_calls_and_their_schemas_may_be_json_each(write):
    parameters = {"type": "object", "properties": {"item": {"type": "string"}}}
    call = {"function": {"name": "f", "arguments": '{"item": "lamp"}'}}
    answer = {"role": "assistant", "tool_calls": [json.dumps(call)]}
    tools = [json.dumps({"name": "f", "parameters": json.dumps(parameters)})]
    path = write("rows.json", json.dumps([{"messages": [{"role": "user", "content": "q"}, answer], "tools": tools}]))
    ((_, messages),) = load_conversations(path)[0]
    assert messages[0]["tools"][0]["function"] == {"name": "f", "parameters": parameters}
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"item": "lamp"}}


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("### Human: q### Assistant: a", True),
        ("SYSTEM: s USER: q ASSISTANT: a <|endoftext|>", True),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>", True),
        ("<s>[INST] q [/INST] a </s>", True),
        ("The assistant: a user of tools.", False),
        ("An assistant helps the user.", False),
    ],
)
def test_whole_texts_that_are_conversations_are_counted(write, text, spoken):
    found, report = only(write("rows.json", json.dumps([{"text": text}])))
    assert found == [("text", text)]
    assert ("whose questions are trained too" in report.line()) == spoken


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.ndjson", '{"instruction": "q", "response": "a"}\n'), ("rows.tsv", "instruction\tresponse\nq\ta\n")],
)
def test_other_names_of_the_same_formats_are_read(write, name, text):
    assert only(write(name, text))[0] == [("user", "q"), ("assistant", "a")]
