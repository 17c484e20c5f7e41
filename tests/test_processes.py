"""Two processes of a launcher train like one, whatever differs between them, and end together."""

import atexit
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import model_utils
import process_utils
import script_utils
import train
from conftest import PROJECT, adapter_bytes, refusal
from message_utils import Stopped, UserError
from script_utils import run_script
from settings_utils import DEFAULTS, Settings

TORCHRUN = ("--nproc_per_node", "2")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
FLAGS = ("--device", "cpu", "--max_steps", 4, "--eval_steps", 2, "--logging_steps", 1, "--sample_prompts", 1)
FLAGS += ("--max_new_tokens", 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders() -> the flags of new folders of a run, the first of them its output folder; and of its rows.

    Of the 49 rows to train on, one is left for the last of FLAGS' four steps: a second process gets none there.
    """
    rows, data = json.loads((PROJECT / "data/demo.json").read_text()), tmp_path_factory.mktemp("data")
    files = data / "training.json", data / "validation.json"
    for file, some in zip(files, (rows[:49], rows[49:69]), strict=True):
        file.write_text(json.dumps(some))

    def folders():
        folder = tmp_path_factory.mktemp("run")
        flags = "--output_dir", folder / "out", "--logs_dir", folder / "logs"
        return *flags, "--custom_dataset_path", files[0], "--validation_dataset_path", files[1]

    return folders


def record_of(output_dir):
    return json.loads((output_dir / "lora-adapter/run.json").read_text())


@pytest.fixture(scope="module")
def two(run, folders):
    """The record of a run by torchrun, and its finished process."""
    places = folders()
    done = run("train.py", *FLAGS, "--batch_size", 2, *places, torchrun=TORCHRUN, **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return record_of(places[1]), done


@pytest.fixture(scope="module")
def alone(run, folders):
    """The record of the same run by one process, and its finished process."""
    places = folders()
    done = run("train.py", *FLAGS, "--batch_size", 4, *places)
    assert done.returncode == 0, done.stderr
    return record_of(places[1]), done


def test_two_processes_train_like_one_with_the_same_rows_to_a_step(two, alone):
    (record, done), (expected, single) = two, alone
    for finished in (done, single):
        assert finished.stdout.count("Done in") == 1
    assert record["first_loss"] == pytest.approx(expected["first_loss"], rel=1e-5)
    assert record["last_loss"] == pytest.approx(expected["last_loss"], rel=1e-4)
    assert record["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-4)


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # which accelerate launch sets


def test_two_processes_that_share_the_base_out_train_like_one_and_go_on_to_the_same_bytes(run_two, folders, alone):
    places, expected = folders(), alone[0]
    output, found = places[1], []
    for _ in range(2):
        first, second = run_two("train.py", *FLAGS, "--batch_size", 2, *places, **ONE_THREAD, **SHARDED)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        found.append((record_of(output), adapter_bytes(output), first))
        shutil.rmtree(output / "lora-adapter")  # as if it had been killed after its first checkpoint
        shutil.rmtree(output / "checkpoints/checkpoint-4")
    (record, weights, done), (_, again, gone_on) = found
    assert "Shards: 2 processes share the base model's 0.03 GiB by FSDP2; each holds 0.01 GiB of it" in done.stderr
    for name in ("first_loss", "last_loss", "validation_loss"):
        assert record[name] == pytest.approx(expected[name], abs=1e-5)
    assert "Going on with the interrupted run" in gone_on.stderr
    assert again == weights


# the second process has less memory, and begins with other weights than the first
UNLIKE = """
import os, sys
import torch
import engine_runner, model_utils, script_utils, train
attach_lora = model_utils.attach_lora
def other_weights(*args):
    model = attach_lora(*args)
    for parameter in model.parameters():
        parameter.data.mul_(2 if parameter.requires_grad else 1)
    return model
run_pass, sizes = engine_runner.StepRunner.run_pass, []
def small_passes_only(runner, rows, scale):
    sizes.append(sum(len(row["input_ids"]) for row in rows))
    done = run_pass(runner, rows, scale)
    if sizes[-1] > 300:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return done
if os.environ["RANK"] == "1":
    engine_runner.StepRunner.run_pass = small_passes_only
    model_utils.attach_lora = other_weights
sys.exit(script_utils.run_script(train.main, sys.argv[1:]))
"""


def test_one_process_with_less_memory_and_other_weights_changes_no_result(run_two, folders, two, tmp_path):
    (tmp_path / "unlike.py").write_text(UNLIKE)
    places = folders()
    first, second = run_two(tmp_path / "unlike.py", *FLAGS, "--batch_size", 2, *places, **ONE_THREAD)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "process 1: Out of memory with a pass of " in second.stderr
    assert "Out of memory" not in two[1].stderr
    for name in ("first_loss", "last_loss", "validation_loss"):
        assert record_of(places[1])[name] == pytest.approx(two[0][name], rel=1e-4)


FULL_DISK = """
import os, sys
import checkpoint_utils, script_utils, train, training_utils
def fail(*args):
    raise OSError(28, "No space left on device")
if os.environ["RANK"] == "0":
    training_utils.save_adapter = fail
sys.exit(script_utils.run_script(train.main, sys.argv[1:]))
"""


def test_a_save_that_fails_in_one_of_two_processes_ends_both_with_its_line(run_two, folders, tmp_path):
    (tmp_path / "full.py").write_text(FULL_DISK)
    places = folders()
    first, second = run_two(tmp_path / "full.py", *FLAGS, "--eval_steps", 1, *places, **ONE_THREAD)
    assert (first.returncode, second.returncode) == (2, -signal.SIGTERM)
    line = first.stderr.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint-1 could not be saved: No space left on device;")
    assert "Traceback" not in first.stderr + second.stderr
    assert "Connection" not in second.stderr
    assert not list((places[1] / "checkpoints").iterdir())


@pytest.fixture
def two_machines(monkeypatch):
    """two_machines(work) -> what work(0) and work(1) give or raise, called at once as by two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    mine, meetings = threading.local(), []

    def meet(rank):
        monkeypatch.setenv("RANK", str(rank))
        meetings.append(process_utils.Meeting())
        return meetings[rank]

    def two_machines(work):
        def alone(rank):
            mine.meeting = found[rank]
            try:
                return work(rank)
            except UserError as error:
                return str(error)
            finally:
                mine.meeting.leave()

        found = [meet(rank) for rank in range(2)]
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(alone, range(2)))

    monkeypatch.setattr(process_utils, "meeting", lambda: mine.meeting)
    monkeypatch.setattr(process_utils, "SIGN", 0.05)
    yield two_machines
    for one in meetings:
        atexit.unregister(one.leave)
        script_utils.BEGUN.remove(one.leave)


def test_two_machines_of_one_rank_are_refused(two_machines, monkeypatch):
    def work(rank):
        monkeypatch.setenv("RANK", "1")
        return refusal(process_utils.Meeting) if rank else None

    assert two_machines(work)[1].startswith("process 1 was started already; give each machine a --machine_rank")


@pytest.mark.parametrize(("rank", "port", "found"), [(0, None, "cannot be opened"), (1, "x", "MASTER_PORT is set to")])
def test_a_port_at_which_no_machine_can_be_met_is_named(rank, port, found, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port or str(taken.getsockname()[1]))
        assert found in refusal(process_utils.open_store, rank, False)


def test_a_first_machine_that_does_not_answer_is_said_and_given_up(monkeypatch, capsys):
    monkeypatch.setattr(process_utils, "UNSAID", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nothing listens there
        port = free.getsockname()[1]
        assert f"no first machine answers at 127.0.0.1:{port} (" in refusal(
            process_utils.wait_for_server, "127.0.0.1", port, 0.1
        )
    assert f"Waiting for the first machine at 127.0.0.1:{port} (" in capsys.readouterr().err


LOSES_A_STORE = """
import message_utils
message_utils.quiet_libraries()
from torch import distributed
server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
client = distributed.TCPStore("127.0.0.1", server.port, wait_for_workers=False)
del server
try:
    client.check(["left"])
except distributed.DistError as error:
    message_utils.say_error(message_utils.system_problem(error))
"""


def test_a_lost_connection_to_the_first_machine_is_one_line():
    found = subprocess.run([sys.executable, "-c", LOSES_A_STORE], cwd=PROJECT, capture_output=True, text=True)
    assert found.stderr.startswith("error: another process of this run ended, or cannot be reached any more; ")
    assert found.stderr.count("\n") == 1


def test_an_error_of_one_machine_is_said_on_both_before_they_form_a_group(two_machines):
    def work(rank):
        for turn in range(2):
            with process_utils.shared_errors():
                if (rank, turn) == (1, 1):
                    raise UserError("rows.json does not exist; give another")

    host = socket.gethostname()
    message = "rows.json does not exist; give another"
    assert two_machines(work) == [f"on {host} (process 1): {message}", message]


@pytest.mark.parametrize("mistake", [("--lora", "8"), ("--custom_dataset_path", "none.json")])  # before and in train()
def test_a_mistake_in_the_command_of_one_machine_ends_both(two_machines, tmp_path, mistake):
    places = "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--logs_dir", str(tmp_path / "logs")
    first, second = two_machines(lambda rank: train.main([*places, *(mistake if rank else ())]))
    assert any(word in second for word in mistake)
    assert first == f"on {socket.gethostname()} (process 1): {second}"


def test_a_machine_whose_process_has_ended_is_not_waited_for(two_machines):
    found = two_machines(lambda rank: rank or process_utils.from_all_processes("here"))
    assert found == ["process 1 has ended; mend what its machine says, and start all machines again", 1]


def test_a_machine_is_waited_for_as_long_as_it_gives_signs_of_life(two_machines, monkeypatch, capsys):
    monkeypatch.setattr(process_utils, "UNSAID", 0.1)
    monkeypatch.setattr(process_utils, "SILENCE", 0.5)

    def slow(rank):
        time.sleep(rank)  # twice as long as a silent one is waited for
        return process_utils.from_all_processes(rank)

    assert two_machines(slow) == [[0, 1], [0, 1]]
    said = capsys.readouterr().err
    assert said.count("Waiting for the other machines: 1 of 2 processes are as far as this one, not yet 1") == 1


def test_a_machine_that_is_silent_ends_the_run(two_machines, monkeypatch):
    monkeypatch.setattr(process_utils, "SILENCE", 0.3)
    monkeypatch.setattr(process_utils.Meeting, "give_signs", lambda meeting: None)
    found = two_machines(lambda rank: time.sleep(1) if rank else process_utils.from_all_processes(rank))
    assert "process 1 has given no sign of life for " in found[0]


def test_an_output_folder_that_the_first_process_does_not_see_is_refused(monkeypatch, tmp_path):
    train.check_same_folder(tmp_path / "shared")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(process_utils, "from_first_process", lambda *call: ".seen-by-all-elsewhere")
    assert "the machines do not share one " in refusal(train.check_same_folder, tmp_path / "own")
    assert [*tmp_path.rglob("*")] == [tmp_path / "shared"]


def alike(first, other):
    """What check_alike raises where the second process has `other` instead of `first`, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_utils, "from_all_processes", lambda own: [("here", first), ("there", other)])
        try:
            train.check_alike(first)
        except UserError as error:
            return str(error)


def test_a_process_that_trains_otherwise_than_the_first_one_is_refused():
    found = alike({"learning_rate": 1, "training_data": "49 rows"}, {"learning_rate": 2, "training_data": "49 rows"})
    assert found.startswith("process 1 on there would not train like the first one (learning_rate 1 -> 2);")


def test_other_versions_on_another_machine_are_a_notice(capsys):
    assert alike({"versions": {"torch": "1"}}, {"versions": {"torch": "2"}}) is None
    assert "process 1 on there has other versions than the first one (torch 1 -> 2)" in capsys.readouterr().err


def test_each_machine_may_have_its_own_places_and_what_a_training_does_not_use():
    base = model_utils.Base("path", "models", model_utils.CPU, torch.float32, None, None)
    settings = Settings(**DEFAULTS)
    changes = dict.fromkeys(("output_dir", "base_model_name", "custom_dataset_path", "device", "temperature"), "there")
    first, other = (train.shaping_settings(some, base) for some in (settings, settings._replace(**changes)))
    assert first == other
    assert "learning_rate" in first


ENDS = [
    (UserError("3 rows were found, expected 4; add one"), 2, "error: 3 rows were found, expected 4; add one"),
    (Stopped(signal.SIGTERM, "Stopped at step 4 of 16"), 143, "Stopped at step 4 of 16"),  # by another machine's signal
]


@pytest.mark.parametrize(("end", "code", "line"), ENDS, ids=["mistake", "signal"])
def test_the_report_of_a_launcher_names_what_ended_it(end, code, line, monkeypatch, tmp_path):
    def ended(argv):
        raise end

    path = str(tmp_path / "error.json")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
    assert run_script(ended, []) == code
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=path)
    report = str(ChildFailedError("train.py", {0: failure}))
    assert line in report
    assert "To enable traceback" not in report
