"""Datasets of a Hub: the split's files are found, downloaded and read unchanged; each refusal in one line."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HTTPError

from conftest import PROJECT, refusal
from fake_hub import COMMIT, NO_SERVER, TOKEN, environment, serve
from hub_utils import find_files, hub_errors

# a reader that guesses types would change each of these
TEXTS = ["None", "007", "2024-01-31", "null", "1e5", "NA", "true", " spaced ", "a\u2028b", "Grüße 🙂"]
TWO_CONFIGURATIONS = """---
configs:
- config_name: english
  data_files: english.jsonl
- config_name: french
  data_files:
  - split: train
    path: [fr/a.jsonl, fr/b.jsonl]
  - split: test
    path: fr/test.jsonl
---
# Two languages
"""
DEFAULT_CONFIGURATION = TWO_CONFIGURATIONS.replace("english\n", "english\n  default: true\n")
# prints {dataset: texts of its messages, two a row}; where several are asked for, an error stands in place of the texts
READ = """
import json, sys
from data_utils import load_announced
from message_utils import UserError
from script_utils import run_script

def main(argv):
    cache_dir, *datasets = argv
    found = {}
    for dataset in datasets:
        try:
            conversations, _ = load_announced("Data", dataset, {}, cache_dir)
            found[dataset] = [message["content"] for _, messages in conversations[:] for message in messages]
        except UserError as error:
            if len(datasets) == 1:
                raise
            found[dataset] = str(error)
    print(json.dumps(found))

sys.exit(run_script(main, sys.argv[1:]))
"""


def jsonl(*texts):
    """Rows whose instruction is the text and whose response is it again, behind an arrow."""
    return "".join(json.dumps({"instruction": text, "response": f"> {text}"}) + "\n" for text in texts).encode()


def parquet(*texts):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"instruction": texts, "response": [f"> {text}" for text in texts]})
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def both(*texts):
    """The texts of the conversations that jsonl() and parquet() describe."""
    return [side for text in texts for side in (text, f"> {text}")]


LANGUAGES = {
    "english.jsonl": jsonl("hello"),
    "fr/a.jsonl": jsonl("un"),
    "fr/b.jsonl": jsonl("deux"),
    "fr/test.jsonl": jsonl("trois"),
}
DATASETS = {
    "team/rows": {
        "README.md": b"# Rows\n",
        "data/train-00002-of-00003.jsonl": jsonl("the third shard"),
        "data/train-00000-of-00003.jsonl": jsonl(*TEXTS),
        "data/train-00001-of-00003.jsonl": jsonl("the second shard"),
        "data/test-00000-of-00001.jsonl": jsonl("held out"),
    },
    "team/files": {"train.jsonl": jsonl("to train"), "test.jsonl": jsonl("to test")},
    "team/csv": {"rows.csv": b"instruction,response\n007,None\n2024-01-31,1e5\n"},
    "team/parquet": {"data/train-00000-of-00001.parquet": parquet(*TEXTS)},
    "team/two": {"README.md": TWO_CONFIGURATIONS.encode(), **LANGUAGES},
    "team/default": {"README.md": DEFAULT_CONFIGURATION.encode(), **LANGUAGES},
    "team/text": {"train.txt": b"hello\n"},
    "team/packed": {"train.jsonl.gz": b"\x1f\x8b"},
    "team/empty": {"README.md": b"# Nothing yet\n"},
    "team/untidy": {"train-1.jsonl": jsonl("fine"), "train-2.jsonl": jsonl("fine too") + b"{broken\n"},
}


@pytest.fixture(scope="module")
def hub():
    """A fake Hub that serves DATASETS."""
    with serve(datasets=DATASETS) as server:
        yield server


# what is asked for -> the rows' texts, or words of the refusal
ROWS = {
    "team/rows:test": ["held out"],
    "team/files": ["to train"],
    "team/files:test": ["to test"],
    "team/parquet": TEXTS,
    "team/two:english:train": ["hello"],
    "team/two:french:train": ["un", "deux"],
    "team/two:french:test": ["trois"],
    "team/default": ["hello"],
    "team/default:french:test": ["trois"],
}
UNKNOWN_NAMES = {
    "team/rows:dev": ["no split 'dev'", "its splits are train, test"],
    "team/rows:french:train": ["no configuration 'french'", "choose one of default"],
    "team/two": ["several configurations", "english, french", "for example team/two:english:train"],
    "team/two:french": ["several configurations", "for example team/two:french:train"],
    "team/two:german:test": ["no configuration 'german'", "for example team/two:english:test"],
    "team/two:french:dev": ["no split 'dev' in its configuration french", "train, test"],
    "team/default:french": ["no split 'french' in its configuration english, one of english, french"],
}
OTHER_FILES = {
    "team/text": [".txt files", "convert"],
    "team/packed": [".gz files", "convert"],
    "team/empty": ["doesn't contain any data files", "give a dataset of"],
}


@pytest.fixture(scope="module")
def read_from(run, tmp_path_factory):
    """read_from(url, folder, "team/rows") -> CompletedProcess of READ: the libraries read the Hub's settings when they
    are imported.
    """
    script = tmp_path_factory.mktemp("script") / "read.py"
    script.write_text(READ)

    def read_from(url, folder, *datasets, offline="0"):
        settings = environment(url, folder, offline)
        settings["PYTHONPATH"] += f"{os.pathsep}{PROJECT}"
        return run(script, folder / "cache", *datasets, **settings)

    return read_from


@pytest.fixture
def read(hub, read_from, tmp_path):
    """read("team/rows:test") -> CompletedProcess, with all files under tmp_path."""
    return lambda *datasets: read_from(hub.url, tmp_path, *datasets)


@pytest.fixture(scope="module")
def outcomes(hub, read_from, tmp_path_factory):
    """What becomes of each dataset of ROWS, UNKNOWN_NAMES and OTHER_FILES: its texts or its error."""
    done = read_from(hub.url, tmp_path_factory.mktemp("hub"), *ROWS, *UNKNOWN_NAMES, *OTHER_FILES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def texts_of(done):
    """The texts of the one dataset that was read."""
    assert done.returncode == 0, done.stderr
    (texts,) = json.loads(done.stdout).values()
    return texts


def missing_words(message, words):
    assert isinstance(message, str)
    return [word for word in words if word not in message]


def check_refusal(done, *words):
    """Check a run that ended in one error line, its last, that holds the words."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert errors == done.stderr.splitlines()[-1:]
    assert missing_words(errors[0], words) == []
    assert TOKEN not in done.stderr
    assert done.stdout == ""


# ---- What is read ----------------------------------------------------------------------------------------------------
def test_without_a_split_all_shards_of_train_are_read_in_order_and_no_text_changes(read):
    done = read("team/rows")
    assert texts_of(done) == both(*TEXTS, "the second shard", "the third shard")
    assert "Data: team/rows, JSON Lines (instruction, response): 12 rows, 12 kept\n" in done.stderr


@pytest.mark.parametrize("dataset", ROWS)
def test_the_split_and_configuration_that_are_named_are_read(dataset, outcomes):
    assert outcomes[dataset] == both(*ROWS[dataset])


def test_cells_of_a_csv_dataset_stay_as_they_are(read):
    assert texts_of(read("team/csv")) == ["007", "None", "2024-01-31", "1e5"]


def test_data_files_lie_under_the_cache_and_are_downloaded_once(read, hub, tmp_path):
    first = texts_of(read("team/rows"))
    snapshot = tmp_path / "cache/hub/datasets--team--rows/snapshots" / COMMIT
    shards = sorted(path.name for path in (snapshot / "data").iterdir())
    assert shards == [f"train-{n:05}-of-00003.jsonl" for n in range(3)]
    assert list((tmp_path / "home").rglob("*.jsonl")) == []
    asked = len(hub.requests)
    assert texts_of(read("team/rows")) == first
    again = [path for path, _ in hub.requests[asked:]]
    assert any("/datasets/team/rows" in path for path in again)
    assert [path for path in again if path.endswith(".jsonl")] == []


def test_the_token_reaches_the_hub_and_no_file(read, hub, tmp_path):
    asked = len(hub.requests)
    done = read("team/rows:test")
    assert texts_of(done) == both("held out")
    sent = {authorization for path, authorization in hub.requests[asked:] if path.endswith(".jsonl")}
    assert sent == {f"Bearer {TOKEN}"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"conversations.jsonl", "test-00000-of-00001.jsonl"} <= {path.name for path in written}
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in done.stderr


def test_train_takes_a_dataset_of_the_hub(hub, run, tmp_path):
    folders = ("--output_dir", tmp_path / "output", "--logs_dir", tmp_path / "logs")
    flags = ("--custom_dataset_path", "team/rows", "--dry_run", *folders)
    done = run("train.py", *flags, **environment(hub.url, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "team/rows, JSON Lines (instruction, response): 12 rows, 12 kept" in done.stderr
    assert json.loads((tmp_path / "output/data_report.json").read_text())
    check_refusal(run("train.py", *flags, **environment(NO_SERVER, tmp_path)), "team/rows", "no connection")


# ---- What is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dataset", UNKNOWN_NAMES)
def test_an_unknown_split_or_configuration_lists_those_that_exist(dataset, outcomes):
    name = dataset.split(":")[0]
    assert missing_words(outcomes[dataset], [f"dataset {name} has ", "choose one", *UNKNOWN_NAMES[dataset]]) == []


@pytest.mark.parametrize("dataset", OTHER_FILES)
def test_files_of_other_types_are_refused_before_any_is_downloaded(dataset, outcomes, hub):
    words = (dataset, ".json, .jsonl, .csv or .parquet", *OTHER_FILES[dataset])
    assert missing_words(outcomes[dataset], words) == []
    assert [path for path, _ in hub.requests if path.endswith((".txt", ".gz"))] == []


def test_an_unknown_split_ends_in_one_line_that_lists_the_splits(read):
    check_refusal(read("team/rows:dev"), "team/rows has no split 'dev'", "train, test")


def test_a_faulty_row_names_the_dataset_the_file_and_the_line(read):
    check_refusal(read("team/untidy"), "team/untidy, train-2.jsonl, line 2", "invalid JSON")


LICENCE = "https://huggingface.co/datasets/"
LOCAL = "give a local file"


@pytest.mark.parametrize(
    ("dataset", "server", "words"),
    [
        ("team/private", "up", ["401", "spelling", "HF_TOKEN", f"{LICENCE}team/private"]),
        ("team/gated", "up", ["403", "gated", "licence", "HF_TOKEN", f"{LICENCE}team/gated"]),
        ("team/unknown", "up", ["404", "no local file", "no such dataset", "spelling"]),
        ("team/broken", "up", ["answered 500", "try again", LOCAL]),
        ("team/rows", "down", ["no connection", "check the network", "try again", LOCAL]),
        ("team/rows", "offline", ["HF_HUB_OFFLINE is set", "unset it", LOCAL]),
    ],
    ids=["401", "403", "404", "500", "no server", "HF_HUB_OFFLINE"],
)
def test_a_hub_that_refuses_or_fails_is_one_line_with_the_remedy(dataset, server, words, hub, read_from, tmp_path):
    asked = len(hub.requests)
    url, offline = NO_SERVER if server == "down" else hub.url, "1" if server == "offline" else "0"
    done = read_from(url, tmp_path, dataset, offline=offline)
    check_refusal(done, dataset, *words)
    assert len(hub.requests) > asked or server != "up"
    assert len(hub.requests) == asked or server == "up"
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_a_hub_that_does_not_answer_in_time_is_no_connection():
    def wait():
        with hub_errors("team/rows", kind="dataset"):
            raise HTTPError("The read operation timed out")

    assert missing_words(refusal(wait), ["team/rows (no connection)", "try again", LOCAL]) == []


@pytest.mark.parametrize(
    "path", ["data/mine.jsn", "./x", "../x", "~/x", ".mine/x", "mine.jsonl", "team/mine.csv", "a/b/c", "mine"]
)
def test_a_mistyped_path_is_a_missing_file_and_no_question_to_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.setattr("hub_utils.download_from_hub", lambda *_: pytest.fail("the Hub is asked"))
    message = refusal(find_files, path, tmp_path)
    assert message.startswith("dataset ")
    assert f"{path.lstrip('./~')} does not exist" in message
    assert "; give an existing .json, .jsonl, .csv or .parquet file" in message
