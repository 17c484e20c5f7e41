"""Fixtures that several test files share: the bundled tokenizer, tiny models, and a way to run the scripts."""

import atexit
import functools
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach the Hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is: the test processes share the cores

from message_utils import VOICE, UserError, quiet_libraries
from settings_utils import DEFAULTS, Settings

quiet_libraries()  # before bitsandbytes is imported, as the entry scripts do: it speaks at its import

from safetensors.torch import load_file, save_file  # noqa: E402

import model_utils  # noqa: E402
import train  # noqa: E402
from warm import WarmProcess  # noqa: E402

PROJECT = Path(__file__).resolve().parent.parent
TINY_BASE = str(PROJECT / "models" / "tiny-base")


# the files that take longest for their number of tests: begun last, they would leave one of two processes idle
LONG_FILES = ("test_end_to_end.py", "test_processes.py", "test_faults.py", "test_checkpoints.py", "test_runs.py")


def pytest_collection_modifyitems(items):
    """The long files first; pytest-xdist hands out files in this order."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


def refusal(function, *args):
    """The message of the UserError that the call must raise; it is one line."""
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert "\r" not in message
    return message


@pytest.fixture(autouse=True)
def quiet():
    quiet_libraries()
    VOICE.said.clear()


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A process that was started in the background ignores some signals; here they do what they do in a terminal."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """Let the garbage collector skip all that is imported by now, and nothing else: a script that a test runs in this
    process would freeze what the tests before it left. Holds an entry for each time that one wanted to.
    """
    gc.freeze()
    wanted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: wanted.append("again"))
        yield wanted


@pytest.fixture(autouse=True)
def garbage_is_collected(frozen):
    """A script run in this process would leave it to the next test."""
    yield
    gc.enable()
    if frozen:
        frozen.clear()
        gc.collect()


@pytest.fixture
def tokenizer():
    """The bundled tokenizer, ready for training; loaded afresh, since tests change its template."""
    return model_utils.load_tokenizer(TINY_BASE)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run one of the project's scripts as a user would: run("train.py", "--dry_run") -> CompletedProcess.

    The process has PyTorch loaded when it starts, which saves three seconds; a cold one has loaded nothing, and so has
    one that is to see GPUs, as CUDA does not work in a fork.
    """

    def run_script(script, *arguments, cwd=PROJECT, stdin="", torchrun=(), cold=False, **environment):
        if not (cold or torchrun or environment.get("CUDA_VISIBLE_DEVICES")):
            folder = tmp_path_factory.mktemp("process")
            return WarmProcess(folder, PROJECT / script, arguments, cwd, outside(environment), stdin).wait(600)
        launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
        command = [sys.executable, *launcher, str(PROJECT / script), *map(str, arguments)]
        known = {"capture_output": True, "text": True, "timeout": 600, "check": False}
        return subprocess.run(command, cwd=cwd, env=outside(environment), input=stdin, **known)

    return run_script


@pytest.fixture(scope="session")
def run_two(tmp_path_factory):
    """Run a script in two processes, as a launcher does: run_two("train.py") -> two CompletedProcess, by rank.

    If one fails, the other is ended by SIGTERM.
    """

    def run_script(script, *arguments, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
        processes = []
        for rank in ("0", "1"):
            place = outside(meeting | two | {"RANK": rank, "LOCAL_RANK": rank} | environment)
            folder = tmp_path_factory.mktemp("process")
            processes.append(WarmProcess(folder, PROJECT / script, arguments, PROJECT, place))
        while all(process.process.exitcode is None for process in processes):
            processes[0].process.join(0.1)
        if any(process.process.exitcode for process in processes):
            for process in processes:
                process.process.terminate()
        return [process.wait(600) for process in processes]

    return run_script


def outside(changes):
    """The environment of a script's process."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | changes


# ---- Whole small runs, in this process -------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    rows = [
        {"instruction": f"Say {word} {n} times", "response": " ".join([word] * n)}
        for word in ("red", "green", "blue", "grey")
        for n in range(1, 7)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def contradicted(tmp_path_factory):
    """Settings whose validation answers are not the training ones: the loss on them falls at first, then rises."""
    path = tmp_path_factory.mktemp("data") / "validation.json"
    path.write_text(
        json.dumps([{"instruction": f"Say red {n} times", "response": "A dog ran home."} for n in range(10, 14)])
    )
    return {
        "validation_dataset_path": str(path),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "num_epochs": 3,
    }


@pytest.fixture(scope="session")
def undisturbed(dataset, tmp_path_factory):
    """undisturbed(**changes): the output folder of a whole run that nothing met; each is made once."""
    made = {}

    def run_once(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = small_run(dataset, tmp_path_factory.mktemp("undisturbed"), **changes)
        return made[key]

    return run_once


@functools.cache
def small_base():
    """The folder of the bundled base with two of its eight layers: a run of it takes half as long."""
    folder = Path(tempfile.mkdtemp(prefix="small-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(TINY_BASE, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not re.match(r"model\.layers\.[2-7]\.", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def small_run(dataset, folder, fresh=False, kind=Settings, **changes):
    """Train small_base() for a few steps with dropout and accumulation; returns the output folder.

    Two adapters to a layer, as seven make the same run take half as long again.
    """
    settings = kind(**DEFAULTS)._replace(
        base_model_name=small_base(),
        custom_dataset_path=str(dataset),
        output_dir=str(folder / "out"),
        logs_dir=str(folder / "logs"),
        run_name="run",
        use_4bit_quantization=False,
        device="cpu",
        gradient_checkpointing=False,
        lora_target_modules="q_proj,v_proj",
        lora_dropout=0.1,
        batch_size=2,
        gradient_accumulation_steps=2,
        num_epochs=1,
        eval_steps=2,
        sample_prompts=1,
        max_new_tokens=4,
        learning_rate=1e-3,
    )
    train.train(settings._replace(**changes), fresh=fresh)
    return folder / "out"


def adapter_bytes(output_dir):
    return (output_dir / "lora-adapter" / "adapter_model.safetensors").read_bytes()
