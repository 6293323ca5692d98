"""The scripts for clusters: their commands fit the flags, and a job goes back into the queue when it should."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM, TPU = ROOT / "launch" / "slurm", ROOT / "launch" / "tpu"
SCRIPTS = [SLURM / "train.sh", TPU / "train.sh"]
TEXTS = [*SCRIPTS, SLURM / "README.md", TPU / "README.md"]

# Parses each line of standard input as the flags of a program, in a process of its own, since flags are global.
PARSE = """
import importlib, os, shlex, sys
from absl import flags
from sct.errors import SctError
for line in sys.stdin:
    program, *words = shlex.split(line)
    if os.fork() == 0:
        status = 1
        try:
            module = importlib.import_module("sct.commands." + program)
            argv = [program, *words]
            sys.argv = module.prepare(argv) if hasattr(module, "prepare") else argv
            rest = flags.FLAGS(sys.argv)
            assert rest[1:] == [], rest
            status = 0
        except (SctError, flags.Error, AssertionError, AttributeError) as error:
            print(line.strip(), ":", error, file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.wait()[1]:
        sys.exit(1)
"""


def commands(text: str) -> list[list[str]]:
    """Programs of this project and their words in a text, without what stands for something to fill in."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        for pattern, program in (
            (r"-m launch\.(\w+)(.*)", None),
            (r"(?:sbatch .*)?launch/(?:slurm|tpu)/train\.sh (?:start )?(--config.*)", "train"),
        ):
            match = re.search(pattern, line)
            if match is None:
                continue
            name, rest = (program, match[1]) if program else (match[1], match[2])
            # What follows is no longer the command, or stands for words that a user fills in.
            rest = re.sub(r"[`;>#|\"$].*|\.\.\.", "", rest)
            found.append([name, *shlex.split(rest)])
    return found


def parse(found: list[list[str]]) -> subprocess.CompletedProcess[str]:
    lines = "\n".join(shlex.join(words) for words in found)
    return subprocess.run(
        [sys.executable, "-c", PARSE], input=lines, cwd=ROOT, text=True, capture_output=True, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_the_scripts_are_sound(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_every_command_fits_the_flags():
    found = [command for path in TEXTS for command in commands(path.read_text())]
    stages = [words for words in found if words[0] == "train" and "--config=configs/sct_spatial.py" in words]
    assert len(stages) >= 2
    assert {words[0] for words in found} == {"train", "ingest", "speed"}
    # A command must be given its configuration; what stands in a script for the user's words has none.
    whole = [w for w in found if w[0] == "ingest" or any(re.match("--config=.", x) for x in w)]
    assert len(whole) >= 8
    done = parse(whole)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "wrong", ["--config.data.shop=x", "--no_such_flag=1", "--config.train.batch_size=many", "word"]
)
def test_a_wrong_command_would_be_found(wrong):
    assert parse([["train", "--config=configs/sct_sc.py", wrong]]).returncode == 1


def fakes(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which programs of a cluster are small scripts."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("happens", "restarts", "status", "again"),
    [
        ("mkdir -p run/model", 0, 0, False),
        ("mkdir -p run/checkpoints/5", 0, 0, True),  # the time was over, and the run saved
        ("mkdir -p run/checkpoints/5", 40, 0, True),
        ("mkdir -p run/checkpoints/5; exit 1", 0, 0, True),  # a node was lost
        ("mkdir -p run/checkpoints/5; exit 1", 20, 1, False),
        ("mkdir -p run; exit 1", 0, 1, False),  # a mistake in the command
        ("exit 143", 0, 0, True),  # stopped while it compiled
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_until_the_model_is_there(
    tmp_path, happens, restarts, status, again
):
    env = fakes(tmp_path, srun=f'echo "$@" > said; env > seen; {happens}', scontrol='echo "$@" > requeued')
    env |= {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts), "https_proxy": "http://proxy"}
    words = ["--config=configs/sct_sc.py", "--workdir=run", "--config.data.store=a store"]
    done = subprocess.run([SLURM / "train.sh", *words], cwd=tmp_path, env=env, check=False)
    assert done.returncode == status
    said = (tmp_path / "said").read_text()
    assert (
        "-m launch.train --multihost --config=configs/sct_sc.py --workdir=run --config.data.store=a store"
        in said
    )
    assert "https_proxy" not in (tmp_path / "seen").read_text()
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text().split() == ["requeue", "77"]


def test_a_slurm_job_needs_a_run_folder(tmp_path):
    done = subprocess.run(
        [SLURM / "train.sh", "--config=configs/sct_sc.py"],
        env=fakes(tmp_path, srun="touch started"), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--workdir=FOLDER is missing" in done.stderr
    assert not (tmp_path / "started").exists()


def test_a_pod_gets_the_words_as_they_were_given_on_every_worker(tmp_path):
    (tmp_path / "home" / "sct").mkdir(parents=True)
    gcloud = """
        echo "$@" >> "$HERE/asked"
        for word; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
        cd "$HERE/home" && bash -c "$command"
    """
    env = fakes(tmp_path, gcloud=gcloud, trainer='printf "%s|" "$@"')
    env |= {"TPU": "pod", "ZONE": "zone", "HERE": str(tmp_path), "PYTHON": "trainer"}
    words = ["--config=configs/sct_sc.py", "--config.data.store=data/a store's"]
    subprocess.run([TPU / "train.sh", "start", *words], cwd=tmp_path, env=env, check=True)
    asked = (tmp_path / "asked").read_text()
    assert "compute tpus tpu-vm ssh pod --zone=zone --worker=all" in asked
    pid = int((tmp_path / "home" / "sct" / "train.pid").read_text())
    assert pid > 0
    log = tmp_path / "home" / "sct" / "train.log"
    for _ in range(200):
        if log.read_text().endswith("store's|"):
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert log.read_text() == "|".join(["-m", "launch.train", "--multihost", *words]) + "|"
    assert subprocess.run([TPU / "train.sh"], cwd=tmp_path, env=env, check=False).returncode == 2
