"""The command line: help worth reading, one line for a mistake, and exit statuses that scripts can use."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, TERNARY, data, environment, spectra, texts, trained

from spectra_jax import cli
from spectra_jax.errors import UserError

# What each command's help must speak of.
COMMANDS = {
    "train": ["--config.", "--workdir", "--accept-changes", "--distributed", "configs/trilm.py:99m", "schema.py"],
    "sweep": ["--sweep", "get_sweep", "one subfolder per row"],
    "prepare": ["--tokenizer", "train:N", "--context", "tfds:NAME", "default 2048", "resumes"],
    "evaluate": ["WORKDIR[@STEP]", "--sets", "default validation"],
    "prune": ["--checkpoint", "--config.prune.ratio", "configs/pruned.py", "configs/finetune.py"],
    "generate": ["--prompt", "--temperature", "--top-k", "0 for all"],
    "import": [".gguf", "--weight", "runs/smollm2"],
    "delta": ["BASE[@STEP]", "FINETUNED[@STEP]", "--config", "configs/delta.py"],
    "export": ["--to", "--out", "transformers loads", "bfloat16"],
    "plot": ["workdirs", ".svg", "tokens or step"],
    "suite": ["bits"],
    "quickstart": ["runs/quickstart", "on a CPU"],
    "checkpoints": ["WORKDIR", "checksums hold"],
    "verify": ["WORKDIR", "each array"],
    "quantize": ["--checkpoint", "configs/quantlm.py", "last finished layer"],
    "pack": ["--checkpoint", "--out"],
    "compare": ["WORKDIR[@STEP]", "--out", "--sets"],
    "harness": ["--tasks", "--beside", "--include"],
    "plan": ["--topology", "--compile", "--search"],
    "analyze": ["scaling", "deployment", "axes", "--alignment"],
    "report": ["--out", "HTML"],
}


def test_all_commands_are_here():
    assert set(COMMANDS) == set(cli.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_as_command_and_as_module(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for part in COMMANDS[command]:
        assert part in text, f"spectra {command} --help does not speak of {part}"
    done = spectra("--help", module=f"spectra_jax.{command}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: spectra {command} ")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text or f"\n    {command}\n" in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see spectra --help"),
        (["trian", "--config=x"], "unknown command 'trian'; did you mean train?"),
        (["evalaute"], "unknown command 'evalaute'; did you mean evaluate?"),
        (["xyz"], "unknown command 'xyz'; the commands are train, sweep, quickstart, "),
        (["train"], "the following arguments are required: --config, --workdir; see spectra train --help"),
        (["train", "--confg=x"], "unknown argument '--confg=x'; did you mean --config?"),
        (["train", "--config=x", "--workdir=y", "z"], "unknown argument 'z'; see spectra train --help"),
        (["train", "--config=x", "--workdir=y", "--config.model.L", "3"], "--config.model.L has no value; write --co"),
        (["evaluate", "--checkpont", "x"], "unknown argument '--checkpont'; did you mean --checkpoint?"),
        (["evaluate", "--checkpoint=x", "--config.model.L=3"], "unknown argument '--config.model.L=3'"),
        (["prepare", "a.txt", "--out=o", "--tokeniser=t"], "argument '--tokeniser=t'; did you mean --tokenizer?"),
        (["prepare", "a.txt", "--out=o", "--tokenizer=neox", "--context=2k"], "--context: invalid int value: '2k'"),
        (["suite", "--zzzz"], "unknown argument '--zzzz'; see spectra suite --help"),
        (["plot"], "the following arguments are required: workdirs; see spectra plot --help"),
        (["train", "--config=configs/none.py", "--workdir=y"], "no config file 'configs/none.py'"),
        (["generate", "--checkpoint=nowhere", "--prompt=x"], "nowhere holds no run: it has no config.json"),
        (["plot", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message(arguments, message):
    with pytest.raises(UserError) as error:
        cli.run(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_may_begin_with_dashes():
    """A value is not taken for an option."""
    with pytest.raises(UserError, match="nowhere holds no run"):
        cli.run(["generate", "--checkpoint=nowhere", "--prompt", "-- said the whale"])


def test_a_mistake_ends_with_status_2_and_no_traceback():
    done = spectra("train", "--config=configs/quickstart.py", "--workdir=never-made", "--config.model.wieght=float")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key config.model.wieght; did you mean config.model.weight?\n"
    assert not (ROOT / "never-made").exists()


def test_every_module_takes_the_same_arguments():
    done = spectra("--chekpoint=x", module="spectra_jax.generate")
    assert (done.returncode, done.stderr) == (
        2, "error: unknown argument '--chekpoint=x'; did you mean --checkpoint?\n"
    )


@pytest.mark.parametrize("arguments", [["suite"], ["train", "--help"]])
def test_a_reader_that_goes_away(arguments):
    """As in `spectra suite | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "spectra_jax.cli", *arguments], stdout=write, stderr=subprocess.PIPE, text=True,
        env=environment(), cwd=ROOT, check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.returncode == 0


def test_suite(capsys):
    cli.run(["suite"])
    text = capsys.readouterr().out
    assert all(size in text for size in ("99m", "190m", "390m", "560m", "830m", "1.1b", "1.5b", "2.4b", "3.9b"))


def test_plot(tmp_path, capsys):
    path = tmp_path / "curves.svg"
    cli.run(["plot", str(trained(*TERNARY)), f"--out={path}", "--x=step"])
    assert capsys.readouterr().out == f"{path}\n" and path.read_text().startswith("<?xml")


def test_prepare(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts(30)))
    cli.run([
        "prepare", str(tmp_path / "text.txt"), f"--out={tmp_path / 'set'}", "--tokenizer=train:280", "--context=8",
        "--validation-percent=50", "--licence=CC0", "--workers=1",
    ])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [f"{tmp_path / 'set'}:", "train"], [f"{tmp_path / 'set'}:", "validation"]
    ]
    assert "records of 8 (+1)" in lines[0] and "bytes per token" in lines[0]


def test_evaluate_and_generate_print_their_result(capsys):
    cli.run(["evaluate", f"--checkpoint={trained(*TERNARY)}", "--sets", str(data()), "--sequences=8"])
    assert "bits/byte" in capsys.readouterr().out
    cli.run(["generate", f"--checkpoint={trained(*TERNARY)}", "--prompt=the whale", "--tokens=3", "--seed=2"])
    assert capsys.readouterr().out.startswith("the whale")
