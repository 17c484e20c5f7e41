"""Scripts in processes that have PyTorch loaded when they start, as loading it takes most of a short run's time.

They are forks of one process that has loaded libraries and done nothing else. What reads the environment when it is
loaded (huggingface_hub, transformers and all that build on them, and this project's own files) each loads by itself.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parent
PATHS_OF_PYTEST = ("", str(TESTS), str(TESTS.parent))  # which it adds to sys.path
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "warm",
        "torch",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.utils.tensorboard",
        "pandas",
        "pyarrow.dataset",
    ]
)


def start(script, arguments, folder, environment, streams):
    """Begin what `cd folder; python script arguments` does; returns the process, which has pid, join() and exitcode.

    The three streams are paths: a file to read, and two to write stdout and stderr to.
    """
    process = FORKS.Process(target=run_as_main, args=(script, arguments, folder, dict(environment), streams))
    process.start()
    return process


def run_as_main(script, arguments, folder, environment, streams):
    """The work of start(), in the new process."""
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(Path(script).parent), *added, *(path for path in sys.path if path not in PATHS_OF_PYTEST)]
    for path in added:
        if (Path(path) / "sitecustomize.py").exists():
            runpy.run_path(f"{path}/sitecustomize.py")
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # multiprocessing would leave them out
