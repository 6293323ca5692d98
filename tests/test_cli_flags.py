"""What commands say to a wrong command line, their help, and output into a closed pipe."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sct import cli
from sct.commands import configuration
from sct.weights import packaged

ROOT = Path(__file__).resolve().parents[1]

# Runs each command line of standard input in a process of its own, since flags are global, and prints what came of it.
FORKS = """
import json, os, sys, tempfile, traceback
from ml_collections import config_flags
import sct.commands.flag_parsing
if "--help" not in sys.argv:  # once for all
    import sct.data.ingest.build, sct.inference.inputs, sct.train.experiment
from sct import cli
found = []
for program, *words in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = 0
            try:
                if program.startswith("launch."):
                    sys.argv = [program, *words]
                    cli.main(program.removeprefix("launch."))
                else:
                    sys.argv = ["sct", *words]
                    cli.main()
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
                status = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        found.append([status, out.read().decode(), err.read().decode()])
json.dump(found, sys.stdout)
"""


def outcomes(lines: list[list[str]], folder: Path) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of command lines."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, lines[0][-1]], cwd=folder, input=json.dumps(lines), text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(status, out, err) for status, out, err in json.loads(done.stdout)]


EMBED = ["embed", "--input=x.h5ad", "--model=m", "--output=o.h5ad"]
TRAIN = ["train", "--config=sct_sc:quickstart"]
# Words of a command line -> what its one sentence holds.
WRONG = {
    # Unknown flags, with the one that was meant.
    ("embed", "--ouput=x"): ["--ouput", "did you mean --output?"],
    (*EMBED, "--n-contexts=2"): ["--n-contexts", "--n_contexts?"],
    (*EMBED, "--noseed"): ["--seed=N"],
    (*EMBED, "--no_overwrite"): ["--nooverwrite?"],
    (*EMBED, "--config.train.steps=3"): ["--config.train.steps"],
    (*EMBED, "--qwxyz=1"): ["--qwxyz"],
    (*TRAIN, "--work_dir=x"): ["--workdir?"],
    (*TRAIN, "--output=x"): ["--workdir?"],
    ("embed", "--workdir=x"): ["--output?"],
    ("speed", "--config=sct_sc", "--json=a", "--output=b"): ["--json", "--output"],
    ("benchmark", "--config=benchmark", "--config.output=a", "--output=b"): ["--config.output", "--output"],
    (*EMBED, "--quiet", "--verbose"): ["--quiet", "--verbose"],
    (*EMBED, "--device=gup"): ["--device=gup", "did you mean gpu?"],
    (*TRAIN, "--train.steps=3"): ["--config.train.steps?"],
    (*TRAIN, "--steps=3"): ["--config.train.steps?"],
    # Flags without a value.
    (*EMBED, "--seed"): ["--seed=N"],
    ("embed", "--input", "--model=m", "--output=o.h5ad"): ["--input needs a value"],
    ("embed", "--input", "=", "x.h5ad", "--model=m"): ["--input=PATH", "without spaces"],
    ("embed", "--input=", "--model=m", "--output=o.h5ad"): ["--input needs a value"],
    (*TRAIN, "--config.train.steps"): ["--config.train.steps needs a value"],
    # Values of the wrong type, out of bounds, or none of the choices.
    (*EMBED, "--batch_size=x"): ["--batch_size=x", "integer"],
    (*EMBED, "--batch_size=0"): ["--batch_size=0", "positive"],
    ("annotate", "--input=x", "--output=o.h5ad", "--threshold=2"): ["--threshold=2", "[0.0, 1.0]"],
    (*EMBED, "--duplicates=summ"): ["--duplicates=summ", "did you mean sum?"],
    (*EMBED, "--overwrite=perhaps"): ["--overwrite=perhaps", "true or false"],
    (*EMBED, "--nooverwrite=1"): ["--nooverwrite takes no value"],
    ("speed", "--config=sct_sc", "--mode=forwards"): ["--mode=forwards", "did you mean forward?"],
    ("convert", "--from=haiku", "--input=a", "--output=b"): ["--from=haiku", "did you mean haiku-sct?"],
    ("generate", "--model=m", "--output=o.h5ad", "--label=x"): ["--label=x", "NAME=VALUE"],
    # Flags that are missing, or need another.
    ("embed", "--model=m"): ["--input and --output are missing"],
    # The packaged default model, if there is one, takes the place of --model.
    ("embed",): [
        "--input and --output are" if packaged.has_default() else "--input, --output and --model are missing"
    ],
    ("embed", "--input=x.h5ad", "--output=o.h5ad", "--step=3"): ["--model"],
    ("ingest", "--output=o"): ["--input is missing"],
    ("impute", "--input=x", "--model=m", "--output=o.h5ad"): ["--genes and --cells"],
    ("train",): ["--config is missing"],
    ("train", "--config.train.steps=3"): ["--config is missing"],
    (*TRAIN, "--coordinator=a:1"): ["--coordinator", "--multihost"],
    ("embed", "--flagfile=nothing"): ["--flagfile", "nothing"],
    # Configurations.
    ("train", "--config"): ["--config needs a value"],
    ("train", "--config=sct_cs"): ["sct_cs", "did you mean --config=sct_sc?"],
    ("train", "--config=no/such.py"): ["no/such.py", "zeromics_sc"],
    ("train", "--config=sct_sc:quikstart"): ["quikstart", "did you mean sct_sc:quickstart?"],
    ("train", "--config=sct_sc:else"): ["else", "mini, quickstart"],
    ("train", "--config=broken.py"): ["broken.py", "NameError", "line 3"],
    ("train", "--config=syntax.py"): ["syntax.py", "SyntaxError", "line 1"],
    ("train", "--config=empty.py"): ["empty.py", "get_config"],
    ("benchmark", "--config=sct_sc"): ["--config=benchmark"],
    (*TRAIN, "--config.train.stpes=3"): ["'stpes'", "--config.train.steps?"],
    ("train", "--config.train.stpes=3", "--config", "sct_sc"): ["'stpes'", "--config.train.steps?"],
    (*TRAIN, "--config.batch_size=3"): ["'batch_size'", "--config.train.batch_size?"],
    (*TRAIN, "--config.train.qwxyz", "3"): ["'qwxyz'", "choose from"],
    (*TRAIN, "--config.train.steps.more=3"): ["--config.train.steps=VALUE"],
    (*TRAIN, "--config.train.steps=many"): ["--config.train.steps=many", "integer"],
    (*TRAIN, "--config.train.steps=1.5"): ["--config.train.steps=1.5", "integer"],
    (*TRAIN, "--config.optimizer.peak_lr=x"): ["--config.optimizer.peak_lr=x", "number"],
    (*TRAIN, "--config.train=3"): ["--config.train=3", "section"],
    (*TRAIN, "--noconfig.train.steps"): ["config.train.steps", "boolean"],
    (*TRAIN, "--config.train.steps", "--multihost"): ["--config.train.steps=VALUE"],
    (*TRAIN, "--config.train.accumulate=2", "--config.train.grad_accum_steps=4"): [
        "accumulate",
        "grad_accum_steps",
    ],
    ("generate", "--model=m", "--output=o.h5ad", "--text=a", "--abstract=b"): ["--text", "--abstract"],
    (*TRAIN, "--only=base"): ["--only"],
    # Words that are no flags.
    ("embed", "x.h5ad", "--model=m", "--output=o.h5ad"): ["'x.h5ad'", "--input=x.h5ad"],
    (*EMBED, "batch_size=3"): ["--batch_size=3"],
    (*EMBED, "stray"): ["'stray'", "--name=value"],
    (*EMBED, "--overwrite", "yes"): ["'yes'"],
    (*EMBED, "--", "stray"): ["'stray'"],
    ("impute", "--input=x", "--model=m", "--output=o.h5ad", "--genes=A,", "B"): ["'B'", "without spaces"],
    ("train", "sct_sc"): ["--config=sct_sc"],
    (*TRAIN, "train.steps=3"): ["--config.train.steps=3"],
    # No command.
    ("embd",): ["'embd'", "did you mean sct embed?"],
    ("--input=x",): ["command must come first"],
}


def test_a_wrong_command_line_is_one_sentence_and_the_usage(tmp_path):
    (tmp_path / "broken.py").write_text("\ndef get_config():\n    return nothing\n")
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    (tmp_path / "empty.py").write_text("")
    lines = [["sct", *words] for words in WRONG]
    lines += [[f"launch.{words[0]}", *words[1:]] for words in (("embed", "--ouput=x"), [*TRAIN, "stray"])]
    expected = [
        *WRONG.values(),
        ["python -m launch.embed", "--output?"],
        ["python -m launch.train", "'stray'"],
    ]
    wrong = []
    for line, parts, (status, out, err) in zip(lines, expected, outcomes(lines, tmp_path), strict=True):
        said = err.strip().splitlines()
        good = status == 2 and not out and len(said) == 2 and said[0].startswith("error: ")
        good &= said[-1:] != [] and said[-1].startswith(
            f"usage: {line[0].replace('launch', 'python -m launch')}"
        )
        if not good or not all(part in said[0] for part in parts) or "FATAL" in err or "Traceback" in err:
            wrong.append((line[1:], status, out, err))
    assert not wrong
    assert sorted(os.listdir(tmp_path)) == ["broken.py", "empty.py", "syntax.py"]


def test_right_command_lines_get_as_far_as_their_input(tmp_path):
    """Flags in every form, former names with one notice each, and a configuration after its fields."""
    (tmp_path / "flags.txt").write_text("--seed=3\n")
    ends = "no/such"
    right = [
        ["embed", "-input", f"{ends}.h5ad", "--model=m", "--output", "o.h5ad", "--nooverwrite"],
        ["annotate", f"--input={ends}.h5ad", "--output=o.h5ad", "--threshold=-0", "--flagfile=flags.txt"],
        ["ingest", f"{ends}.h5ad", "--output=o", "--processes=1"],
        [
            "ingest",
            "--input",
            f"{ends}.h5ad",
            "--output=o",
            "--skip_bad",
            "--noskip_bad",
            "--orthologues=no/such",
        ],
        ["generate", f"--model={ends}", "--output=o.h5ad", "--text", "An abstract."],
        [
            "train",
            f"--config.data.store={ends}",
            "--config.data.shuffle_cells",
            "4096",
            "--config.train.steps",
            "3",
            "--config=sct_sc",
            "--workdir=run",
        ],
    ]
    found = outcomes([["sct", *words] for words in right], tmp_path)
    wrong = [
        (words, *each)
        for words, each in zip(right, found, strict=True)
        if each[0] != 1 or ends not in each[2]
    ]
    assert not wrong
    (quiet,) = outcomes([["sct", *right[3], "--quiet"]], tmp_path)
    assert len(quiet[2].splitlines()) == 1
    assert quiet[2].startswith("error: ")
    notices = [[line for line in err.splitlines() if line.startswith("note: ")] for _, _, err in found]
    assert [len(each) for each in notices] == [0, 0, 0, 2, 1, 0]
    assert "--skip_invalid" in notices[3][0]
    assert "--orthologs" in notices[3][1]
    assert "--text is now --abstract" in notices[4][0]


def test_former_names_of_configuration_fields_are_taken_with_a_notice(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from sct.commands.configuration import config_folder\nimport runpy\n"
        "def get_config():\n"
        "    config = runpy.run_path(str(config_folder() / 'sct_sc.py'))['get_config']('quickstart')\n"
        "    config.model.stem_kernel_size = 15\n    return config\n"
    )
    words = configuration.prepare([f"--config={file}", "--config.model.stem_taps=7"])
    assert words[1:] == ["--config.model.stem_kernel_size=7"]
    assert "--config.model.stem_kernel_size" in capsys.readouterr().err
    with pytest.raises(configuration.FlagError, match="stem_taps"):
        configuration.prepare(["--config=sct_spatial", "--config.train.stem_taps=7"])
    # A file of an earlier version has the former name.
    before = (
        "    config.train.accumulate = config.train.grad_accum_steps\n    del config.train.grad_accum_steps\n"
    )
    file.write_text(file.read_text().replace("    return config\n", before + "    return config\n"))
    for name in ("accumulate", "grad_accum_steps"):
        words = configuration.prepare([f"--config={file}", f"--config.train.{name}=2"])
        assert words[1:] == ["--config.train.accumulate=2"]


def test_an_output_that_is_closed_from_the_start_changes_no_status(tmp_path):
    command = f"{sys.executable} -m sct --version >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0


def test_help_describes_every_flag(tmp_path):
    commands = list(cli._COMMANDS)
    shown = outcomes([["sct", name, "--help"] for name in commands], tmp_path)
    wrong = []
    for name, (status, out, err) in zip(commands, shown, strict=True):
        if status or err or not out.startswith(f"usage: sct {name} ") or f"    sct {name} " not in out:
            wrong.append((name, status, out, err))
        if "Writes " not in out and "Prints " not in out:
            wrong.append((name, "what it writes"))
        listed = out.partition("\nFlags:\n")[2]
        entries = [entry for entry in ("\n" + listed).split("\n  --") if entry.strip()]
        wrong += [
            (name, entry) for entry in entries if not entry.strip().endswith(".") or len(entry.split()) < 4
        ]
        wrong += [(name, line) for line in out.splitlines() if len(line) > 80]
        if "(default:" in out or "None" in out:
            wrong.append((name, "a default that tells nothing"))
        if name == "ingest" and len(entries) < 20:
            wrong.append((name, len(entries)))
    assert not wrong


def test_modes_of_speed_are_those_that_there_are():
    from sct.speed import job

    # Importing several commands into one process would define flags twice.
    tree = ast.parse((ROOT / "sct" / "commands" / "speed.py").read_text())
    (listed,) = [
        ast.literal_eval(call.args[2])
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "flags.DEFINE_enum"
        and call.args[0].value == "mode"
    ]  # fmt: skip
    assert tuple(listed) == job.MODES


PIPED = """
import sys
from sct import cli
from rich.console import Console
def quiet(command):
    Console().print("x\\n" * 5_000)
def pipe_of_another(command):
    raise BrokenPipeError("a worker is gone")
what = sys.argv.pop(1)
if what != "help":
    cli._main = {"rich": quiet, "worker": pipe_of_another}[what]
cli.main()
"""


def test_output_into_a_closed_pipe_ends_silently():
    """Also where both outputs are closed, and where rich writes; a broken pipe of something else is a defect."""
    wrong = []
    for what, words in (
        ("help", ["--help"]), ("help", ["embed", "--help"]), ("help", ["embed"]), ("rich", []), ("worker", []),
    ):  # fmt: skip
        reading, writing = os.pipe()
        os.close(reading)
        both = what == "help" and "--help" not in words
        defect = what == "worker"
        done = subprocess.run(
            [sys.executable, "-c", PIPED, what, *words], stdout=None if defect else writing,
            stderr=writing if both else subprocess.PIPE, cwd=ROOT, check=False,
        )  # fmt: skip
        os.close(writing)
        if done.returncode != (1 if defect else 141) or (b"Traceback" in (done.stderr or b"")) != defect:
            wrong.append((what, words, done))
        if not defect and done.stderr:
            wrong.append((what, words, done.stderr))
    assert not wrong
