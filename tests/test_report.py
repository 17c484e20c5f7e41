"""The data report: exact figures, what a user is told of them, and where it is written."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import report_utils
import train
from conftest import PROJECT, TINY_BASE, refusal
from data_utils import load_conversations, store_conversations
from settings_utils import DEFAULTS, Settings
from test_prompts import ID_TEMPLATES, assistant, encoded, tokenize, user
from token_utils import ANSWER_CUT, DROPPED, KEPT, SHORTENED, tokenize_conversations

LIMIT = 40


def told(capsys, report):
    """The lines that print_report says."""
    capsys.readouterr()
    report_utils.print_report(report)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def report_on(tokenizer, folder, conversations, validation=(), max_seq_length=512):
    """The report on conversations, numbered from 1, and on validation conversations, numbered from 101."""
    sets = []
    for name, first, messages in (("train", 1, conversations), ("validation", 101, validation)):
        sets.append(store_conversations(folder / f"{name}.jsonl", enumerate(map(list, messages), start=first)))
    rows = [tokenize_conversations(tokenizer, stored, max_seq_length, "data", folder) for stored in sets]
    return report_utils.build_report([], *sets, *rows, max_seq_length, None)


# ---- Figures ---------------------------------------------------------------------------------------------------------
def test_the_figures_of_tokenized_rows_are_exact():
    status = np.array([KEPT] * 4 + [SHORTENED] * 2 + [ANSWER_CUT] * 3 + [DROPPED] * 2)
    full_length = np.array([5, 10, 10, 20, 50, 60, 100, 200, 300, 7, 8])
    kept = status != DROPPED
    all_rows = {
        "status": status,
        "full_length": full_length,
        "row": np.array([31, 4, 5, 6, 9, 8, 12, 11, 10, 40, 2]),
        "control": np.array([0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1]),
        "other_control": np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
        "further": np.array([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
    }
    index = {"length": np.minimum(full_length, LIMIT)[kept], "trained": np.array([1, 2, 3, 4, 5, 6, 7, 8, 9])}
    found = report_utils.describe_tokens(SimpleNamespace(all_rows=all_rows, index=index))
    histogram = found.pop("histogram")
    assert found == {
        "rows": 11,
        "whole": 4,
        "shortened": {"count": 2, "rows": [8, 9]},
        "answer_cut": {"count": 3, "rows": [10, 11, 12]},
        "no_trainable_token": {"count": 2, "rows": [2, 40]},
        "tokens": 5 + 10 + 10 + 20 + 5 * 40,
        "trained_tokens": 45,
        # of 5 7 8 10 10 20 50 60 100 200 300
        "length_quantiles": {"min": 5, "median": 20, "90 %": 200, "99 %": 290, "max": 300},
        "length_that_cuts_none": 300,
        "further_sequences": {"count": 1, "rows": [6]},
        "answers_with_control_tokens": {"count": 3, "rows": [2, 4, 9]},
        "prompts_with_control_tokens": {"count": 1, "rows": [10]},
    }
    # 290 / 16 = 18.1 tokens to a bar
    assert histogram == {"counts": [5, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0], "up_to": 290, "longer": 1}


def test_of_many_rows_the_first_five_numbers_are_named():
    assert report_utils.tally(np.array([9, 8, 7, 6, 5, 4])) == {"count": 6, "rows": [4, 5, 6, 7, 8]}
    assert report_utils.tally(np.array([], dtype=int)) == {"count": 0, "rows": []}


def test_the_report_on_a_small_dataset_is_exact_from_the_file_to_the_lines(tokenizer, tmp_path, capsys):
    long = "word " * 60
    rows = [
        {"instruction": "What is it?", "response": "A bell."},
        {"instruction": long, "response": "A bell."},
        {"instruction": "What is it?", "response": long},
        {"instruction": "What is it?", "response": " "},
        {"instruction": "What is it?", "response": "A bell."},
        {"instruction": "And then?", "response": "Say </s> twice."},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    conversations, read = load_conversations(tmp_path / "rows.jsonl")
    tokenized = tokenize_conversations(tokenizer, conversations, LIMIT, "data", tmp_path / "cache")
    none = conversations.select([])
    no_rows = tokenize_conversations(tokenizer, none, LIMIT, "data", tmp_path / "cache")
    report = report_utils.build_report([read], conversations, none, tokenized, no_rows, LIMIT, None)

    (file,) = report["files"]
    assert (file["rows"], file["kept"]) == (6, 4)
    assert file["dropped"] == {"an empty text": {"count": 1, "rows": [4]}, "duplicate": {"count": 1, "rows": [5]}}
    found = report["training"]
    chosen = [rows[number] for number in (0, 1, 2, 5)]
    single = [encoded(tokenizer, user(row["instruction"]), assistant(row["response"])) for row in chosen]
    lengths = [len(ids) for ids, _ in single]
    answers = [sum(label != -100 for label in labels) for _, labels in single]
    assert lengths[0] < lengths[3] < LIMIT < min(lengths[1:3])
    assert (found["rows"], found["whole"]) == (4, 2)
    assert found["shortened"] == {"count": 1, "rows": [2]}
    assert found["answer_cut"] == {"count": 1, "rows": [3]}
    assert found["no_trainable_token"] == {"count": 0, "rows": []}
    assert found["tokens"] == lengths[0] + lengths[3] + 2 * LIMIT
    # of the cut answer what a quarter of the length for its prompt leaves
    assert found["trained_tokens"] == answers[0] + answers[1] + (LIMIT - LIMIT // 4) + answers[3]
    assert found["length_that_cuts_none"] == max(lengths)
    assert found["length_quantiles"]["min"] == lengths[0]
    assert found["length_quantiles"]["max"] == max(lengths)
    assert found["answers_with_control_tokens"] == {"count": 1, "rows": [6]}
    assert report["validation"] is None
    assert report["validation_prompts_also_trained"] == {"count": 0, "rows": []}
    assert json.loads(json.dumps(report)) == report

    lines = told(capsys, report)
    share = f"{found['trained_tokens'] / found['tokens']:.0%}"
    assert lines[0].startswith(f"Training: 4 rows, {found['tokens']} tokens, {share} trained; tokens a row: ")
    assert f"{lengths[0]} to {max(lengths)}, median" in lines[0]
    assert lines[2] == (
        "  --max_seq_length 40: 2 rows whole, 1 with the prompt's start cut off, answer whole (row 2),"
        f" 1 with the answer's end cut off (row 3); {max(lengths)} would cut none"
    )
    assert "Notice: 1 answer with control tokens, trained as plain text (row 6)" in lines
    assert not [line for line in lines if line.startswith("Validation")]


def test_the_length_that_cuts_none_cuts_none_and_one_less_cuts_one(tokenizer):
    conversations = [(user("q " * n), assistant("a " * n)) for n in (1, 12, 30)]
    length = report_utils.describe_tokens(tokenize(tokenizer, *conversations, max_seq_length=16))[
        "length_that_cuts_none"
    ]
    for limit, whole in ((length, 3), (length - 1, 2)):
        assert report_utils.describe_tokens(tokenize(tokenizer, *conversations, max_seq_length=limit))["whole"] == whole


def test_where_nothing_is_cut_and_nothing_is_odd_there_are_two_lines_a_set(tokenizer, tmp_path, capsys):
    report = report_on(
        tokenizer,
        tmp_path,
        [(user(f"q{n}"), assistant(f"{n} is a number")) for n in range(10)],
        [(user(f"p{n}"), assistant(f"{n} is a number")) for n in range(3)],
    )
    lines = told(capsys, report)
    assert [line.split(":")[0].split("|")[0] for line in lines] == [
        "Training",
        "  rows by length ",
        "Validation",
        "  rows by length ",
    ]
    assert lines[2].startswith("Validation: 3 rows, ")


# ---- Validation prompts that are trained -----------------------------------------------------------------------------
def test_validation_prompts_that_are_trained_with_another_answer_are_counted_and_named(tokenizer, tmp_path, capsys):
    report = report_on(
        tokenizer,
        tmp_path,
        [(user("What is it?"), assistant("A bell.")), (user("Where?"), assistant("There."))],
        [
            (user("Who?"), assistant("He.")),
            (user("what  is IT?"), assistant("A horn.")),  # case and blanks make no other question
            (user("Where?"), assistant("Here.")),
            (user("Where"), assistant("Here.")),
        ],
    )
    assert report["validation_prompts_also_trained"] == {"count": 2, "rows": [102, 103]}
    assert (
        "Notice: 2 validation prompts with a twin in the training rows (rows 102, 103); the validation loss flatters"
    ) in told(capsys, report)


# ---- Answers ---------------------------------------------------------------------------------------------------------
def answers_report(tokenizer, folder, answers):
    return report_on(tokenizer, folder, [(user(f"q{n}"), assistant(text)) for n, text in enumerate(answers)])


@pytest.mark.parametrize(("common", "noticed"), [(2, True), (1, False)])
def test_an_answer_that_a_fifth_of_the_rows_have_is_noticed_and_fewer_are_not(
    common, noticed, tokenizer, tmp_path, capsys
):
    answers = ["I do not know."] * common + [f"It is number {n}." for n in range(10 - common)]
    report = answers_report(tokenizer, tmp_path, answers)
    lines = told(capsys, report)
    assert ("Notice: 20% of the training rows have one answer: 'I do not know.'" in lines) == noticed
    assert any("have one answer" in line for line in lines) == noticed
    if noticed:
        assert report["answers"]["answer"] == {"text": "I do not know.", "share": 0.2, "count": 2}


@pytest.mark.parametrize(("common", "noticed"), [(5, True), (4, False)])
@pytest.mark.parametrize("part", ["opening", "closing"])
def test_openings_and_closings_that_half_of_the_answers_share_are_noticed_and_fewer_are_not(
    part, common, noticed, tokenizer, tmp_path, capsys
):
    fixed = "As an old model" if part == "opening" else "hope this helps you!"
    answers = []
    for n in range(10):
        own = " ".join(f"{word}{n}" for word in ("red", "green", "blue", "grey", "white"))
        shared = n < common
        answers.append(f"{fixed} {own}" if shared and part == "opening" else f"{own} {fixed}" if shared else own * 2)
    report = answers_report(tokenizer, tmp_path, answers)
    found = report["answers"][part]
    verb = "begin" if part == "opening" else "end"
    notices = [line for line in told(capsys, report) if line.startswith("Notice")]
    if noticed:
        assert found == {"text": fixed, "share": 0.5, "count": 5}
        assert notices == [f"Notice: 50% of the answers {verb} with {fixed!r}"]
    else:
        assert (found["text"], found["share"], found["count"]) == (fixed, 0.4, 4)
        assert notices == []


def test_openings_and_closings_of_short_answers_are_not_counted(tokenizer, tmp_path, capsys):
    report = answers_report(tokenizer, tmp_path, [f"It is number {n}" for n in range(8)] + ["It is the number 9 at"])
    assert report["answers"]["opening"]["count"] == 0
    assert not [line for line in told(capsys, report) if line.startswith("Notice")]


def test_the_last_answer_of_a_conversation_is_the_one_that_is_compared(tokenizer, tmp_path):
    conversations = [
        (user("q"), assistant(f"a{n}"), user("r"), assistant("One and the same."), user("thanks")) for n in range(3)
    ]
    found = report_on(tokenizer, tmp_path, conversations)["answers"]["answer"]
    assert found == {"text": "One and the same.", "share": 1.0, "count": 3}


# ---- ANSWERS_CUT_LIMIT -----------------------------------------------------------------------------------------------
def report_of_counts(read, dropped, used, cut, no_token=0, validation=None, left_out=0):
    def counts(rows, cut, no_token):
        return {
            "rows": rows,
            "answer_cut": {"count": cut},
            "no_trainable_token": {"count": no_token},
            "length_that_cuts_none": 1234,
        }

    return {
        "files": [
            {"rows": read, "left_out": left_out, "dropped": {"duplicate": {"count": dropped}} if dropped else {}}
        ],
        "training": counts(used, cut, no_token),
        "validation": counts(*validation) if validation else None,
    }


CUT_SHARES = {
    "answers cut": (report_of_counts(100, 0, 100, 30), 0.3),
    "rows dropped at reading": (report_of_counts(100, 30, 70, 0), 0.3),
    "rows without a trainable token": (report_of_counts(100, 0, 100, 10, 20), 0.3),
    "both sets together": (report_of_counts(100, 0, 80, 20, validation=(20, 5, 5)), 0.3),
    # a quarter dropped, of the rest 1 in 3 cut: 1/4 + 3/4 x 1/3
    "some dropped, some cut, few of the rows used": (report_of_counts(1000, 250, 30, 10), 0.5),
    # of 80 rows that are to be learned, 20 are duplicates
    "rows that are not to be learned do not count": (report_of_counts(100, 40, 60, 0, left_out=20), 0.25),
    "nothing cut": (report_of_counts(10, 0, 10, 0), 0.0),
    "all cut": (report_of_counts(10, 0, 10, 10), 1.0),
}


@pytest.mark.parametrize("case", CUT_SHARES)
def test_more_rows_cut_or_dropped_than_the_limit_are_refused_and_as_many_are_not(case):
    report, share = CUT_SHARES[case]
    report_utils.check_cut_limit(report, share)
    if share:
        message = refusal(report_utils.check_cut_limit, report, share - 0.001)
        assert "raise --max_seq_length (1,234 cuts none)" in message
        assert "--answers_cut_limit 1" in message
    report_utils.check_cut_limit(report, 1)


@pytest.fixture
def dry_run(tmp_path):
    """dry_run(rows, num_epochs=2) runs train.py --dry_run on rows in this process; returns its output folder."""

    def run_dry(rows, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = Settings(**DEFAULTS)._replace(
            base_model_name=TINY_BASE,
            device="cpu",
            use_4bit_quantization=False,
            custom_dataset_path=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / "out"),
            logs_dir=str(tmp_path / "logs"),
        )
        train.train(settings._replace(**changes), dry_run=True)
        return tmp_path / "out"

    return run_dry


def test_a_run_whose_answers_are_cut_is_refused_and_goes_on_with_the_limit_at_1(dry_run, capsys):
    rows = [{"instruction": f"q{n}", "response": "word " * 60 if n < 4 else "Short."} for n in range(10)]
    cut = {"max_seq_length": LIMIT, "validation_split": 0.0}
    message = refusal(lambda: dry_run(rows, **cut))
    assert message.startswith("0 of 10 rows dropped, 4 of 10 without the end of their answer")
    assert "more than 30%" in message
    longest = re.search(r"--max_seq_length \((\d+) cuts none\)", message)[1]
    assert "Plan:" not in capsys.readouterr().err
    dry_run(rows, **cut, answers_cut_limit=1.0)
    dry_run(rows, **cut, answers_cut_limit=0.4)
    refusal(lambda: dry_run(rows, **cut, answers_cut_limit=0.39))
    dry_run(rows, max_seq_length=int(longest), answers_cut_limit=0.0)
    assert len(re.findall(r"^Plan: .* a step", capsys.readouterr().err, flags=re.M)) == 3


# ---- Where it is written ---------------------------------------------------------------------------------------------
ROWS = [{"instruction": f"Say {n}", "response": f"Here is {n} for you."} for n in range(12)]


def test_a_dry_run_writes_the_report_and_leaves_that_of_a_finished_run_alone(dry_run, capsys):
    out = dry_run(ROWS)
    assert f"Data report: {out / 'data_report.json'}" in capsys.readouterr().err
    report = json.loads((out / "data_report.json").read_text())
    assert report["training"]["rows"] + report["validation"]["rows"] == report["files"][0]["rows"] == 12
    assert report["max_seq_length"] == DEFAULTS["max_seq_length"]
    again = dry_run(ROWS[:8])  # where no run was finished the newest report is the one
    assert json.loads((again / "data_report.json").read_text())["files"][0]["rows"] == 8

    for folder in ("lora-adapter", "checkpoints"):
        (out / folder).mkdir()
        (out / "data_report.json").write_text("of the finished run")
        dry_run(ROWS)
        assert (out / "data_report.json").read_text() == "of the finished run"
        assert json.loads((out / "cache" / "data_report.json").read_text())["files"][0]["rows"] == 12
        (out / folder).rmdir()


def test_a_run_writes_its_report_and_moves_that_of_the_run_before_along_with_it(dry_run, tmp_path):
    fast = {
        "max_steps": 1,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "sample_prompts": 0,
        "gradient_checkpointing": False,
        "run_name": "run",
    }
    out = dry_run(ROWS)
    settings = Settings(**DEFAULTS)._replace(
        base_model_name=TINY_BASE,
        device="cpu",
        use_4bit_quantization=False,
        custom_dataset_path=str(tmp_path / "rows.jsonl"),
        output_dir=str(out),
        logs_dir=str(tmp_path / "logs"),
        **fast,
    )
    train.train(settings)
    first = json.loads((out / "data_report.json").read_text())
    assert first["training"]["rows"] == json.loads((out / "lora-adapter/run.json").read_text())["training_rows"] == 11
    train.train(settings._replace(validation_split=0.0))
    assert json.loads((out / "data_report.json").read_text())["training"]["rows"] == 12
    moved = max((out / "previous").iterdir(), key=lambda folder: (folder / "lora-adapter").exists())
    assert json.loads((moved / "data_report.json").read_text()) == first


# ---- On the terminal -------------------------------------------------------------------------------------------------
def test_the_bars_of_the_histogram_grow_with_the_rows_and_few_rows_still_show(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(encoding="utf-8"))
    assert report_utils.draw_bars([0, 1, 500, 1000]) == " ▁▄█"
    assert report_utils.draw_bars([0, 0]) == "  "
    for encoding in ("ascii", "cp1252", None):
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(encoding=encoding))
        assert report_utils.draw_bars([0, 1, 500, 1000]) == " .=@"


def test_in_a_pipe_the_example_stands_in_brackets_on_stderr(tokenizer, capsys):
    rows = tokenize(tokenizer, (user("q"), assistant("a"), user("r"), assistant("b\x1b[31m")))
    train.show_example(tokenizer, rows)
    out, err = capsys.readouterr()
    assert out == ""
    length = len(rows[0]["input_ids"])
    assert err.startswith(f"Example: row 1, {length} tokens, the trained ones in [ ]:\n\n<s>### Instruction:\nq\n\n")
    assert "### Response:\n[a</s>]\n\n### Instruction:\nr\n\n### Response:\n[b[31m</s>]\n" in err
    assert "\x1b" not in err


def test_of_all_rows_one_of_usual_length_is_the_example(tokenizer, capsys):
    train.show_example(tokenizer, tokenize(tokenizer, *[(user("q " * n), assistant("a")) for n in (1, 90, 10, 2, 80)]))
    assert "Example: row 3," in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_on_a_terminal_the_trained_tokens_of_the_example_are_green(tmp_path, encoding):
    """On one without UTF-8 bars and texts are plain, and no character ends the run."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    rows = [{**row, "response": "naïve ☃"} for row in ROWS] if encoding == "ascii" else ROWS
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--custom_dataset_path", tmp_path / "rows.json", "--output_dir", tmp_path / "out"]
    terminal, stderr = pty.openpty()
    command = [sys.executable, PROJECT / "train.py", "--dry_run", *flags, "--logs_dir", tmp_path / "logs"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": encoding}
    with subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=stderr) as process:
        os.close(stderr)
        shown = b""
        try:
            while block := os.read(terminal, 2**16):
                shown += block
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(terminal)
        assert process.stdout.read() == b""
    text = shown.decode().replace("\r\n", "\n")
    assert process.returncode == 0, text
    assert "the trained ones in green:" in text
    bars = re.search(r"rows by length \|(.{16})\|", text)[1]
    if encoding == "ascii":
        assert text.isascii()
        assert "@" in bars
        assert set(bars) <= set(report_utils.PLAIN_BARS)
        assert "\x1b[1;32mna\\xefve \\u2603</s>\x1b[0m" in text
    else:
        assert set(bars) <= set(report_utils.BARS)
        assert re.search(r"### Response:\n\x1b\[1;32mHere is \d+ for you\.</s>\x1b\[0m\n", text)


def test_ids_that_are_made_for_calls_are_counted(tokenizer, tmp_path):
    tokenizer.chat_template = ID_TEMPLATES["nine"]
    call = {"name": "stock", "arguments": {}}
    rows = [
        {"messages": [user("q"), {"role": "assistant", "tool_calls": [call | given]}, user(str(given)), assistant("a")]}
        for given in ({}, {"id": "call_123456789"}, {"id": "abcdefghi"})
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    conversations, read = load_conversations(tmp_path / "rows.jsonl")
    none = conversations.select([])
    sets = [tokenize_conversations(tokenizer, found, 200, "data", tmp_path / "c") for found in (conversations, none)]
    report = report_utils.build_report([read], conversations, none, *sets, 200, tokenizer)
    assert report["ids_made"] == {"form": "nine", "count": 2}
    (line,) = (line for line in report_utils.notices(report) if "letters or digits" in line)
    assert "made for 2 calls without one" in line
