"""What evaluate.py measures, on which rows, what it claims of them and what it writes."""

import csv
import importlib
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.numpy import load_file, save_file

import engine_passes
import evaluate
import evidence_utils
import model_utils
import result_utils
from conftest import TINY_BASE, refusal, small_run
from data_utils import load_conversations
from encoding_utils import encode_prompt
from evidence_utils import SEEN_ROWS
from model_utils import attach_lora, load_base_model
from settings_utils import DEFAULTS, Settings
from tiny import CPU, make_rows


# ---- Figures ---------------------------------------------------------------------------------------------------------
def scores_of(base, tuned, tokens):
    rows = zip(base, tuned, tokens, strict=True)
    return [{"row": row, "tokens": n, "base": b, "tuned": t} for row, (b, t, n) in enumerate(rows, 1)]


def test_the_perplexity_is_that_of_all_answer_tokens_together():
    metrics = result_utils.compare(scores_of([30.0, 2.0], [10.0, 2.0], [10, 2]), [], None)
    assert metrics["base"]["loss"] == pytest.approx(32 / 12)
    assert metrics["tuned"]["perplexity"] == pytest.approx(math.exp(12 / 12))
    assert metrics["tuned"]["answers"] == 0
    assert metrics["difference"]["loss"] == pytest.approx(-20 / 12)
    assert (metrics["rows"], metrics["answer_tokens"], metrics["verdict"]) == (2, 12, "too few rows")


def test_the_verdict_needs_more_than_chance():
    base = [20.0 + index % 3 for index in range(30)]
    better = [nll - 3 + index % 2 for index, nll in enumerate(base)]
    mixed = [nll + (2 if index % 2 else -2) for index, nll in enumerate(base)]
    for before, after, verdict in (
        (base, better, "better"),
        (better, base, "worse"),
        (base, mixed, "no clear difference"),
        (base, base, "no clear difference"),
    ):
        assert result_utils.compare(scores_of(before, after, [10] * 30), [], None)["verdict"] == verdict


def test_the_base_is_measured_without_the_adapter_in_the_same_load(tmp_path):
    base = load_base_model(TINY_BASE, CPU, "float32")
    rows = make_rows((20, 30))
    expected = engine_passes.score_rows(base, rows, 100)
    settings = Settings(**DEFAULTS)._replace(use_4bit_quantization=False)
    model = attach_lora(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    scores = scores_of_both(model.eval(), settings, IndexedRows(rows))
    for score, (nll, tokens), row in zip(scores, expected, rows, strict=True):
        assert (score["row"], score["tokens"]) == (row["row"], tokens)
        assert score["base"] == pytest.approx(nll, rel=1e-5)
        assert abs(score["tuned"] - nll) > 0.1


def scores_of_both(model, settings, rows):
    tuned = evaluate.measure_losses(model, settings, rows, "tuned")
    with model.disable_adapter():
        return evaluate.join_scores(evaluate.measure_losses(model, settings, rows, "base"), tuned)


class IndexedRows(list):
    """Rows with the index that TokenizedRows have."""

    @property
    def index(self):
        columns = {"row": [row["row"] for row in self], "length": [len(row["input_ids"]) for row in self]}
        return {name: evaluate.numpy.array(values) for name, values in columns.items()}


def test_sequences_of_one_conversation_are_one_row(monkeypatch):
    rows = IndexedRows(make_rows((20, 30)))
    rows[1]["row"] = rows[0]["row"]
    model = attach_lora(load_base_model(TINY_BASE, CPU, "float32"), Settings(**DEFAULTS))
    (score,) = scores_of_both(model.eval(), Settings(**DEFAULTS), rows)
    assert score["tokens"] == 25


# ---- Files -----------------------------------------------------------------------------------------------------------
DANGEROUS = [
    *(
        "=1+1",
        "+1",
        "-1",
        "@sum",
        "\tx",
        "\rx",
        "\n=1",
        "  =1",
        "\u3000=1",
        "\u00a0-1",
        "\ufeff=1",
        "\x01=1",
        "\u200b+1",
        "\u202e=1",
    ),
    *("\uff1d1", "\uff0b1", "\uff0d1", "\uff201", " \uff1d1"),
]
HARMLESS = ["a=1", "1-1", 'a "quoted", cell\nof two lines', "a\rb", "", "(-1)", "e@f"]


def test_cells_that_a_spreadsheet_would_run_are_defused_and_others_are_as_they_were(tmp_path):
    cells = DANGEROUS + HARMLESS
    result_utils.write_table(tmp_path / "table.csv", ("row", "=run"), [(n, text) for n, text in enumerate(cells)])
    with open(tmp_path / "table.csv", encoding="utf-8-sig", newline="") as file:
        found = list(csv.reader(file))
    assert found[0] == ["row", "'=run"]
    assert [row[1] for row in found[1:]] == ["'" + text for text in DANGEROUS] + HARMLESS
    assert [row[0] for row in found[1:]] == [str(n) for n in range(len(cells))]
    raw = (tmp_path / "table.csv").read_bytes().decode("utf-8-sig")
    assert re.search(r'"a\rb"', raw)  # quoted: alone it would end a row


@pytest.mark.parametrize(
    ("answers", "check", "said"),
    [
        (["4"] * 10, "number", "Accuracy: the expected answers end in a number; compared"),
        (["4"] * 8 + ["I do not know."] * 2, None, "80% of the expected answers end in a number, and it takes 90%;"),
        (["Hello."] * 6 + ["4"] * 4, None, ""),
    ],
)
def test_accuracy_is_announced_and_why_it_is_not_measured(tmp_path, capsys, answers, check, said):
    rows = conversations(tmp_path, *((f"What is {number}?", answer) for number, answer in enumerate(answers)))
    assert evaluate.choose_samples(rows, Settings(**DEFAULTS))[1] == check
    assert said in capsys.readouterr().err
    assert evaluate.choose_samples(rows, Settings(**DEFAULTS)._replace(answer_check="off"))[1] is None
    assert capsys.readouterr().err == ""


# ---- Evidence --------------------------------------------------------------------------------------------------------
def conversations(folder, *rows):
    path = folder / "rows.json"
    path.write_text(json.dumps([{"instruction": q, "response": a} for q, a in rows]))
    return load_conversations(str(path))[0]


def with_system(folder, *rows):
    path = folder / "systems.json"
    path.write_text(json.dumps([{"instruction": q, "response": a, "system": s} for q, a, s in rows]))
    return load_conversations(str(path))[0]


def test_rows_are_known_again_whatever_their_blanks_case_and_system_text(tmp_path):
    trained = conversations(tmp_path, ("What is it?", "A bell."), ("Where?", "Here."))
    seen = evidence_utils.note_rows(trained, conversations(tmp_path, ("Who?", "Me.")))
    others = conversations(
        tmp_path, ("what  is IT?", "A  bell."), ("What is it?", "A horn."), ("Who?", "Me."), ("Why?", "Here.")
    )
    overlap = evidence_utils.find_overlap(seen, others)
    assert overlap.trained.tolist() == [True, False, False, False]
    assert overlap.prompt_trained.tolist() == [False, True, False, False]
    assert overlap.validated.tolist() == [False, False, True, False]
    polite = with_system(tmp_path, ("Where?", "Here.", "Be polite."))
    assert evidence_utils.find_overlap(seen, polite).trained.tolist() == [True]


def talks(folder, *dialogues):
    roles = ("user", "assistant") * 3
    rows = [[{"role": r, "content": c} for r, c in zip(roles, said.split(), strict=False)] for said in dialogues]
    (folder / "talks.json").write_text(json.dumps([{"messages": row} for row in rows]))
    return load_conversations(str(folder / "talks.json"))[0]


def test_answers_that_were_trained_are_known_in_longer_and_in_shorter_conversations(tmp_path):
    nothing = conversations(tmp_path, ("Who?", "Me."))
    seen = evidence_utils.note_rows(talks(tmp_path, "a 1 b 2", "caf\u00e9 4"), nothing)
    others = talks(tmp_path, "a 1", "a 1 c 3", "a 9 b 2", "b 2", "cafe\u0301 4", "a 1 b 2")
    overlap = evidence_utils.find_overlap(seen, others)
    assert overlap.trained.tolist() == [True, False, False, False, True, True]
    assert overlap.partly.tolist() == [False, True, False, False, False, False]
    assert overlap.prompt_trained.tolist() == [False, False, True, False, False, False]
    left = evidence_utils.without_seen_answers(others, seen)
    weights = [[message.get("weight", 1) for message in messages[1::2]] for _, messages in left]
    assert weights == [[1], [0, 1], [1, 1], [1], [1], [1, 1]]
    assert [number for number, _ in left] == [number for number, _ in others]


def test_what_was_trained_into_the_base_model_before_was_trained(tmp_path):
    first, second, other = (conversations(tmp_path, (name, name)).select([0]) for name in "abc")
    base = evidence_utils.note_rows(first, other)
    seen = evidence_utils.note_rows(second, first, base)
    assert [bool(evidence_utils.find_overlap(seen, rows).trained) for rows in (first, second, other)] == [1, 1, 0]
    assert evidence_utils.is_own_validation(seen, first)


def test_whole_texts_have_no_prompt_that_could_have_been_trained(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    texts = load_conversations(str(tmp_path / "texts.json"))[0]
    overlap = evidence_utils.find_overlap(evidence_utils.note_rows(texts.select([0]), texts.select([])), texts)
    assert (overlap.trained.tolist(), overlap.prompt_trained.tolist()) == ([True, False], [False, False])


def test_digests_are_written_and_read_and_damage_is_told(tmp_path):
    seen = evidence_utils.note_rows(conversations(tmp_path, ("a", "b")), conversations(tmp_path, ("c", "d")))
    evidence_utils.write_seen_rows(tmp_path, seen)
    for found, written in zip(evidence_utils.read_seen_rows(tmp_path), seen, strict=True):
        assert found.tolist() == written.tolist()
    (tmp_path / SEEN_ROWS).write_bytes(b"{}")
    assert "is damaged" in refusal(evidence_utils.read_seen_rows, tmp_path)
    save_file({"trained": seen.trained}, tmp_path / SEEN_ROWS)
    assert "is damaged" in refusal(evidence_utils.read_seen_rows, tmp_path)
    (tmp_path / SEEN_ROWS).unlink()
    assert evidence_utils.read_seen_rows(tmp_path) is None


@pytest.fixture(scope="module")
def measure(undisturbed_once, tmp_path_factory):
    """measure(*flags): (metrics, folder, what was said) of evaluate.py on the adapter of a small run."""

    def call(capsys, *flags, adapter=None, output=None):
        adapter = adapter or undisturbed_once / "lora-adapter"
        output = output or tmp_path_factory.mktemp("out")
        quick = ("--device", "cpu", "--eval_samples", 2, "--max_new_tokens", 2)
        evaluate.main([str(item) for item in ("--adapter_path", adapter, "--output_dir", output, *quick, *flags)])
        said = capsys.readouterr()
        folder = max((output / "evaluation").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return json.loads((folder / "metrics.json").read_text()), folder, said.err + said.out

    return call


@pytest.fixture(scope="module")
def undisturbed_once(dataset, tmp_path_factory):
    return small_run(dataset, tmp_path_factory.mktemp("run"), max_steps=2, eval_steps=1)


@pytest.fixture(scope="module")
def moved(undisturbed_once, tmp_path_factory):
    """The adapter alone, without the rows that its run held out."""
    return shutil.copytree(undisturbed_once / "lora-adapter", tmp_path_factory.mktemp("moved") / "mine")


def test_an_adapter_and_its_checkpoints_carry_the_digests_of_their_rows(undisturbed_once):
    record = json.loads((undisturbed_once / "lora-adapter/run.json").read_text())
    for folder in (undisturbed_once / "lora-adapter", undisturbed_once / "checkpoints/checkpoint-2"):
        found = load_file(folder / SEEN_ROWS)
        assert len(found["trained"]) == record["training_rows"]
        assert len(found["validated"]) == record["validation_rows"]
        assert SEEN_ROWS in json.loads((folder / "identity.json").read_text())["files"]
    assert SEEN_ROWS in json.loads((folder / "manifest.json").read_text())["files"]


def test_changed_digests_are_refused_and_missing_ones_are_not(moved, tmp_path):
    folder = shutil.copytree(moved, tmp_path / "adapter")
    found = load_file(folder / SEEN_ROWS)
    save_file(found | {"trained": found["trained"][:-1]}, folder / SEEN_ROWS)
    content = json.loads((folder / "identity.json").read_text())["base_model"].rpartition(" @ ")[2]
    assert SEEN_ROWS in refusal(model_utils.check_adapter_identity, folder, TINY_BASE, content)
    (folder / SEEN_ROWS).unlink()
    model_utils.check_adapter_identity(folder, TINY_BASE, content)


def test_the_rows_that_a_run_held_out_are_called_so_and_labelled(measure, capsys, undisturbed_once, tmp_path):
    metrics, folder, said = measure(capsys, output=tmp_path)
    rows = len((undisturbed_once / "validation.jsonl").read_text().splitlines())
    assert (metrics["rows"], metrics["trained_rows_seen"], metrics["held_out"]) == (rows, 0, True)
    assert metrics["validation_rows_of_the_run"] == rows
    assert f"{rows} held-out rows" in said
    assert "trained on none of them" in said.splitlines()[0]
    assert folder.name == "run-validation"
    assert {"date", "versions", "settings", "data", "adapter", "base_model", "run", "verdict"} <= metrics.keys()
    assert metrics["data"]["rows"] == rows
    assert metrics["base"]["answers"] == metrics["tuned"]["answers"] == 2
    assert {"ended", "mean_tokens", "length_ratio", "repetition", "exact_match", "chrf", "rouge_l"} < metrics[
        "base"
    ].keys()
    assert {"loss", "low", "high", "chrf"} < metrics["difference"].keys()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [set(sample) for sample in samples] == [{"row", "prompt", "messages", "expected", "base", "tuned"}] * 2
    assert {"text", "ended", "tokens", "chrf"} < samples[0]["tuned"].keys()
    assert len((folder / "rows.csv").read_text(encoding="utf-8-sig").splitlines()) == rows + 1
    # the same again: nothing is overwritten
    _, again, _ = measure(capsys, output=tmp_path)
    assert again.name == "run-validation-2"
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def test_a_checkpoint_is_measured_on_its_runs_rows_under_its_own_name(measure, capsys, undisturbed_once):
    metrics, folder, _ = measure(capsys, adapter=undisturbed_once / "checkpoints/checkpoint-2")
    assert metrics["held_out"] is True
    assert folder.name == "run-checkpoint-2-validation"


def test_rows_that_were_trained_on_are_counted_first_and_left_out(measure, capsys, dataset, undisturbed_once):
    record = json.loads((undisturbed_once / "lora-adapter/run.json").read_text())
    metrics, folder, said = measure(capsys, "--validation_dataset_path", dataset)
    line = next(line for line in said.splitlines() if "rows: the adapter was trained on" in line)
    assert f"trained on {record['training_rows']} of them, which are left out" in line
    assert said.index(line) < said.index("Base model")
    assert metrics["trained_rows_seen"] == metrics["trained_rows_left_out"] == record["training_rows"]
    assert metrics["rows"] == record["validation_rows"]
    assert metrics["held_out"] is True
    assert folder.name == "run-rows"


def test_rows_that_were_trained_on_are_measured_when_asked_for_and_never_called_held_out(
    measure, capsys, dataset, undisturbed_once
):
    record = json.loads((undisturbed_once / "lora-adapter/run.json").read_text())
    metrics, _, said = measure(capsys, "--validation_dataset_path", dataset, "--include_trained_rows")
    assert metrics["rows"] == record["training_rows"] + record["validation_rows"]
    assert (metrics["held_out"], metrics["trained_rows_left_out"]) == (False, 0)
    assert "held-out" not in said
    assert f"{metrics['rows']} rows, {record['training_rows']} of them trained on" in said


def choose(adapter, output, dataset=None, include=False):
    settings = Settings(**DEFAULTS)._replace(validation_dataset_path=dataset and str(dataset))
    return evaluate.choose_rows(settings, [adapter], output, output / "cache", include)


def test_rows_that_were_all_trained_on_are_refused(undisturbed_once, dataset, tmp_path):
    seen = evidence_utils.read_seen_rows(undisturbed_once / "lora-adapter")
    rows = load_conversations(str(dataset))[0]
    trained = evidence_utils.find_overlap(seen, rows).trained
    path = tmp_path / "trained.jsonl"
    path.write_text("".join(json.dumps({"messages": rows[int(i)][1]}) + "\n" for i in trained.nonzero()[0][:5]))
    message = refusal(choose, undisturbed_once / "lora-adapter", tmp_path, path)
    assert "(5 rows), which tells nothing of new rows" in message
    assert "--include_trained_rows" in message
    assert len(choose(undisturbed_once / "lora-adapter", tmp_path, path, include=True).conversations) == 5


def test_prompts_that_were_trained_with_another_answer_are_counted_apart(undisturbed_once, dataset, tmp_path, capsys):
    seen = evidence_utils.read_seen_rows(undisturbed_once / "lora-adapter")
    rows = load_conversations(str(dataset))[0]
    position = int(evidence_utils.find_overlap(seen, rows).trained.nonzero()[0][0])
    prompt = rows[position][1][0]["content"]
    path = tmp_path / "other.json"
    path.write_text(json.dumps([{"instruction": prompt, "response": "Quite another answer."}]))
    measured = choose(undisturbed_once / "lora-adapter", tmp_path, path)
    assert (measured.trained, measured.prompt_trained, measured.left_out) == (0, 1, 0)
    assert "on 1 more prompt with" in capsys.readouterr().err


def test_a_moved_adapter_takes_no_other_runs_rows(moved, undisturbed_once, dataset, tmp_path):
    message = refusal(choose, moved, tmp_path)
    assert "--validation_dataset_path" in message
    # rows of another run lie in OUTPUT_DIR
    other = small_run(dataset, tmp_path / "other", max_steps=1, seed=7, sample_prompts=0)
    assert "does not hold the rows" in refusal(choose, moved, other)
    # its own do
    assert len(choose(moved, undisturbed_once).conversations) > 0


def test_without_digests_nothing_is_claimed(moved, undisturbed_once, tmp_path, dataset, capsys):
    folder = shutil.copytree(moved, tmp_path / "old/lora-adapter")
    (folder / SEEN_ROWS).unlink()
    assert "--validation_dataset_path" in refusal(choose, folder, undisturbed_once)  # not its own, for all one knows
    shutil.copy(undisturbed_once / "validation.jsonl", tmp_path / "old")
    measured = choose(folder, undisturbed_once)
    assert (measured.trained, measured.prompt_trained) == (None, None)
    assert "is unknown" in capsys.readouterr().err
    metrics = {"rows": 5, "held_out": measured.trained == 0, "trained_rows_seen": measured.trained}
    assert result_utils.describe_rows(metrics) == "5 rows, which may have been trained on"


def test_an_adapter_without_validation_rows_asks_for_some(dataset, tmp_path):
    output = small_run(dataset, tmp_path, max_steps=1, validation_split=0.0)
    assert "without validation rows" in refusal(choose, output / "lora-adapter", output)


# ---- Benchmarks ------------------------------------------------------------------------------------------------------
def test_benchmarks_need_an_extra_that_is_named(monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    assert "requirements-benchmarks.txt" in refusal(evaluate.find_benchmarks, ["arc_easy"])
    assert evaluate.find_benchmarks(()) is None


def test_a_limit_without_benchmarks_is_refused():
    for flags in (["--benchmark_limit", "5"], ["--benchmarks", "x", "--benchmark_limit", "0"]):
        assert "--benchmark_limit" in refusal(evaluate.main, flags)


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_base_and_tuned_answer_a_local_benchmark_with_the_prompts_of_training(undisturbed_once, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-benchmarks.txt)")
    benchmark_utils = evaluate.benchmark_utils
    rows = [{"question": f"Is {n} green?", "choices": ["yes", "no"], "answer": n % 2} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert "did you mean arc_easy" in refusal(benchmark_utils.find_tasks, ["arc_easi"])
    assert "does not exist" in refusal(benchmark_utils.find_tasks, [str(tmp_path / "none.yaml")])
    model, tokenizer = model_utils.load_trained_model(undisturbed_once / "lora-adapter")
    asked = benchmark_utils.TemplatedModel(model, tokenizer, "it", 2)
    prompt = asked.apply_chat_template([{"role": "user", "content": "Is 1 green?"}])
    context, answer = asked._encode_pair(prompt, "yes")
    from_us = evaluate.generation_utils.encode_prompt(tokenizer, [{"role": "user", "content": "Is 1 green?"}])
    assert context == from_us
    assert tokenizer.decode(answer) == "yes"
    tasks = benchmark_utils.find_tasks([str(tmp_path / "task.yaml")])
    tuned = benchmark_utils.answer_tasks(model, tokenizer, "the tuned model", tasks, 8, batch_size=2)
    with model.disable_adapter():
        base = benchmark_utils.answer_tasks(model, tokenizer, "the base model", tasks, 8, batch_size=2)
    found = benchmark_utils.compare_tasks(base, tuned)
    assert found["colours"]["rows"] == 8
    figures = found["colours"]["metrics"]["acc"]
    assert 0 <= figures["base"] <= 1
    assert figures["low"] <= figures["mean"] <= figures["high"]
    assert sys_evaluate() is evaluate
    assert len(list(result_utils.benchmark_lines(found))) == 2


def test_a_benchmark_asks_with_the_prompts_of_training_also_where_the_library_is_not_installed(tokenizer, monkeypatch):
    """The part of the model that is ours, in the place of the library that a test environment may lack."""

    class HFLM:
        def __init__(self, tokenizer, **options):
            self.tokenizer = tokenizer

    for name, content in (
        ("lm_eval", {}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": HFLM}),
        ("lm_eval.tasks", {"TaskManager": object}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.delitem(sys.modules, "benchmark_utils", raising=False)
    asked = importlib.import_module("benchmark_utils").TemplatedModel(
        SimpleNamespace(dtype=torch.float32), tokenizer, "it", 2
    )
    monkeypatch.delitem(sys.modules, "benchmark_utils")
    question = [{"role": "user", "content": "Is </s> green?"}]
    prompt = asked.apply_chat_template(question)
    context, answer = asked._encode_pair(prompt, "yes")
    assert context == asked.tok_encode(prompt) == encode_prompt(tokenizer, question)
    assert tokenizer.decode(answer) == "yes"
    assert [len(row) for row in asked.tok_batch_encode([prompt, prompt + "x y z"])[0]] == [len(context) + 3] * 2


def sys_evaluate():
    """What `import evaluate` gives."""
    import evaluate as found  # the script, and not the library of that name

    return found
