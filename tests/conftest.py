"""Fixtures that several test files share: the bundled tokenizer, tiny models, and a way to run the scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach the Hub

import model_utils
from run_utils import UserError, quiet_libraries

PROJECT = Path(__file__).resolve().parent.parent
TINY_BASE = str(PROJECT / "models" / "tiny-base")


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


@pytest.fixture
def tokenizer():
    """The bundled tokenizer, ready for training; loaded afresh, since tests change its template."""
    return model_utils.load_tokenizer(TINY_BASE)


@pytest.fixture(scope="session")
def run():
    """Run one of the project's scripts as a user would: run("train.py", "--dry_run") -> CompletedProcess."""

    def run_script(script, *arguments, cwd=PROJECT, stdin=None, torchrun=(), **environment):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
        launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
        command = [sys.executable, *launcher, str(PROJECT / script), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=environment, input=stdin, timeout=600, check=False
        )

    return run_script
