"""Scripts in processes that have PyTorch loaded when they start, as loading it takes most of a short run's time.

They are forks of one process that has loaded libraries and done nothing else. What reads the environment when it is
loaded (huggingface_hub, transformers and all that build on them, and this project's own files) each loads by itself.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
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


class WarmProcess:
    """A process that does what `cd cwd; python script arguments` does, with its streams as files in a folder."""

    def __init__(self, folder, script, arguments, cwd, environment, stdin=""):
        self.folder, self.arguments = folder, [str(script), *map(str, arguments)]
        for name, text in (("stdin", stdin), ("stdout", ""), ("stderr", "")):
            (folder / name).write_text(text, encoding="utf-8")
        place = (str(folder), str(cwd), dict(environment))
        self.process = FORKS.Process(target=run_as_main, args=(self.arguments, *place))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds):
        """The CompletedProcess, once it has ended."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, seconds)
        said = [(self.folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *said)


def run_as_main(arguments, folder, cwd, environment):
    """The work of a WarmProcess."""
    for number, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))):
        os.dup2(os.open(f"{folder}/{name}", flags), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = arguments
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    script = Path(arguments[0])
    sys.path[:] = [str(script.parent), *added, *(path for path in sys.path if path not in PATHS_OF_PYTEST)]
    for path in added:
        if Path(path, "sitecustomize.py").exists():
            runpy.run_path(f"{path}/sitecustomize.py")
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # multiprocessing would leave them out
