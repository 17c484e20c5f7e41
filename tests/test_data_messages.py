"""What a user with faulty data meets: for each fault one plain line, exit code 2, before anything heavy is loaded.

python -m pytest tests/test_data_messages.py -q -rP     # prints all of them
"""

import json

import pytest

import train
from conftest import PROJECT
from script_utils import run_script

GOOD = {"instruction": "q", "response": "a"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# what was done -> (file, content, what the line says)
FAULTS = {
    "an empty file": ("rows.json", "", "is empty, expected rows"),
    "no rows": ("rows.json", "[]", "holds no rows, expected rows"),
    "a header only": ("rows.csv", "instruction,response\n", "holds no rows, expected rows"),
    "one row": ("rows.json", json.dumps([GOOD]), "cannot be split into training and validation rows; add rows"),
    "a missing column": ("rows.csv", "instruction,reply\nq,a\n", "columns found: instruction, reply; expected"),
    "a column that a later row lacks": ("rows.jsonl", jsonl(GOOD, {"instruction": "r"}), "row 2: column 'response' is"),
    "a null answer": (
        "rows.jsonl",
        jsonl(GOOD, {**GOOD, "response": None}),
        "row 2, column 'response': null is no text",
    ),
    "blank answers only": ("rows.csv", "instruction,response\nq,\nr, \n", "an empty text (rows 1, 2); no row is left"),
    "a number": ("rows.json", json.dumps([{**GOOD, "response": 7}]), "row 1, column 'response': 7 is no text; put it"),
    "a list": ("rows.json", json.dumps([{**GOOD, "response": ["a"]}]), "row 1, column 'response': [\"a\"] is no text"),
    "a yes or no": ("rows.json", json.dumps([{**GOOD, "response": True}]), "row 1, column 'response': true is no text"),
    "UTF-16": ("rows.csv", "instruction,response\nq,a\n".encode("utf-16"), "line 1: UTF-16, expected UTF-8 text; save"),
    "Latin-1": ("rows.csv", "instruction,response\nq,caf\xe9\n".encode("latin-1"), "line 2: not UTF-8 text; save the"),
    "half a surrogate pair": ("rows.json", r'[{"instruction": "q", "response": "\ud800"}]', "half of a surrogate pair"),
    "a ragged CSV row": ("rows.csv", "instruction,response\nq,a, b\n", "line 2: 3 cells, expected 2 as in the header"),
    "a quote that is never closed": (
        "rows.csv",
        'instruction,response\nq,"a\nr,b\n',
        "line 2: invalid CSV (a quote is",
    ),
    "a column named twice": ("rows.csv", "response,instruction,response\na,q,b\n", "names a column twice"),
    "a truncated JSONL file": ("rows.jsonl", jsonl(GOOD, GOOD)[:-9], "line 2: invalid JSON"),
    "a broken JSON file": ("rows.json", '[{"instruction": "q",}]', "line 1: invalid JSON"),
    "NaN": ("rows.json", '[{"instruction": "q", "response": NaN}]', "line 1: NaN is not valid JSON; write null or a"),
    "a name twice in one object": (
        "rows.json",
        '[{"response": "a", "response": "b"}]',
        "names 'response' twice; remove",
    ),
    "column-oriented JSON": (
        "rows.json",
        '{"instruction": ["q"], "response": ["a"]}',
        "expected a list of rows: [{...}",
    ),
    "a text where a row belongs": (
        "rows.json",
        '["q"]',
        'row 1: "q", expected rows with an instruction and a response: {"',
    ),
    "an unknown speaker": ("rows.jsonl", jsonl({"messages": [{"role": "bard", "content": "q"}]}), "speaker 'bard'"),
    "messages that are no list": (
        "rows.jsonl",
        jsonl({"messages": "q"}),
        "column 'messages': a text that is no JSON, expected a list",
    ),
    "a tool call without a name": (
        "rows.jsonl",
        jsonl({"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}),
        'message 2: a call of a tool without a name, expected {"name": "search", "arguments": {}}',
    ),
    "a question without an answer": ("rows.jsonl", jsonl({"messages": TURNS[:1]}), "no answer (row 1); no row is left"),
    "no Parquet file": ("rows.parquet", "PAR1 but not really", "damaged or no Parquet file"),
    "a spreadsheet": (
        "rows.xlsx",
        b"PK\x03\x04",
        "unknown file type '.xlsx', a zip archive or a spreadsheet (unpack it, or save the sheet as CSV), expected",
    ),
}


@pytest.fixture
def last_line(tmp_path, capsys, monkeypatch):
    """last_line(*flags): run train.py --dry_run in this process; returns its exit code and the last line it said."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*flags):
        folders = ("--output_dir", tmp_path / "output", "--logs_dir", tmp_path / "logs")
        code = run_script(train.main, [str(flag) for flag in ("--dry_run", *flags, *folders)])
        said = capsys.readouterr().err.strip().splitlines()
        print(said[-1])
        return code, said[-1]

    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_data_is_one_line_with_its_place_and_remedy(last_line, tmp_path, fault):
    name, content, expected = FAULTS[fault]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, line = last_line("--custom_dataset_path", path)
    assert code == 2
    assert line.startswith("error: ")
    assert expected in line
    assert name in line or fault == "one row"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("absent.json",),
            "absent.json does not exist; give an existing .json, .jsonl, .csv or .parquet file or a Hub id",
        ),
        (("tests",), "dataset tests is a folder, expected one"),
        (
            ("data/demo.json", "--dataset_columns", '{"instruction": "q", "response": "a"}'),
            "missing q, a; columns found:",
        ),
        (
            ("data/demo.json", "--dataset_columns", '{"prompt": "instruction"}'),
            "expected the keys instruction and response",
        ),
        (
            ("data/demo.json", "--validation_dataset_path", "data/demo.json"),
            "every training row stands in the validation",
        ),
        (
            ("data/demo.json", "--max_seq_length", "40"),
            "more than 30 %; mend the data, raise --max_seq_length (129 cuts none)",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_are_one_line_with_the_remedy(last_line, flags, expected):
    code, line = last_line("--custom_dataset_path", *flags)
    assert code == 2
    assert expected.replace("30 %", "30%") in line


def test_a_row_of_a_million_characters_is_cut_and_reported(last_line, tmp_path):
    rows = [{"instruction": f"question {i} " * 10, "response": "a"} for i in range(8)]
    rows += [{"instruction": "word " * 200_000, "response": "b"}, {"instruction": "x" * 1_000_000, "response": "c"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, line = last_line("--custom_dataset_path", tmp_path / "rows.json", "--validation_split", 0)
    assert code == 0, line
    report = json.loads((tmp_path / "output/data_report.json").read_text())["training"]
    assert report["shortened"] == {"count": 2, "rows": [9, 10]}
    assert report["length_that_cuts_none"] > 200_000


def test_faulty_data_is_named_before_the_libraries_are_loaded(run, tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "q", "response": 7}]')
    probe = (
        "import sys, train, script_utils;"
        "code = script_utils.run_script(train.main, sys.argv[1:]);"
        "print(code, 'transformers' in sys.modules)"
    )
    (tmp_path / "probe.py").write_text(probe)
    folders = ("--output_dir", tmp_path / "output", "--logs_dir", tmp_path / "logs")
    done = run(
        tmp_path / "probe.py",
        "--custom_dataset_path",
        tmp_path / "rows.json",
        *folders,
        cold=True,
        PYTHONPATH=str(PROJECT),
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
