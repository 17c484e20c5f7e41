"""What becomes of files of rows as people have them: python benchmarks/inputs.py FOLDER [MODEL ...]

Every file in FOLDER is given to a dry run of train.py, once for each model (the bundled one alone if none is named). In
the table stand the rows that would be trained and the trained share of their tokens, with the number of each notice;
or the number of the one line with which the file is refused. Anything else is an error of ours, and the exit code is 1.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from message_utils import UserError, quiet_libraries
from settings_utils import make_settings

BUNDLED = "models/tiny-base"
PROSE = (".md", ".txt", ".py")  # what stands beside the rows in such a folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=[BUNDLED])
    parser.add_argument("--flags", default="{}", help='settings of every run, as JSON: {"chosen_only": true}')
    options = parser.parse_args()
    quiet_libraries()
    files = sorted(path for path in options.folder.iterdir() if path.is_file() and path.suffix not in PROSE)
    lines, wrong = {}, 0
    print("file".ljust(32), *(Path(model).name[:15].ljust(24) for model in options.models))
    for path in files:
        cells = []
        for model in options.models:
            outcome, said = try_file(path, model, json.loads(options.flags))
            numbers = [str(lines.setdefault(line, len(lines) + 1)) for line in said]
            cells.append(outcome + (f" ({', '.join(numbers)})" if numbers else ""))
            wrong += outcome == "WRONG"
        print(path.name[:32].ljust(32), *(cell.ljust(24) for cell in cells), flush=True)
    for line, number in lines.items():
        print(f"({number}) {line}")
    return min(wrong, 1)


def try_file(path, model, given):
    """(outcome, what was said of it) of a dry run on a file of rows."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        own = {"custom_dataset_path": str(path), "base_model_name": str(model), "device": "cpu"}
        paths = {"output_dir": f"{folder}/output", "logs_dir": f"{folder}/logs", "use_4bit_quantization": False}
        try:
            train.train(make_settings(own | paths | given), dry_run=True)
        except UserError as error:
            return "no", [str(error).replace(f"{path.parent}/", "")]
        except Exception as error:  # noqa: BLE001 - whatever it is, a user must not meet it
            return "WRONG", [f"{type(error).__name__}: {error}"]
    found = re.search(r"Training: ([\d,]+) rows, .*? (\d+% trained)", said.getvalue())
    notices = re.findall(r"^(?:Notice|System text): (.*)$", said.getvalue(), re.MULTILINE)
    return f"{found[1]} rows, {found[2]}", notices


if __name__ == "__main__":
    sys.exit(main())
