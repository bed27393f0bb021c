"""`spectra generate`: a prompt, a file of prompts, the standard input, or a conversation."""

import io
import json
import os
import sys

import jax
import pytest
from helpers import TERNARY, spectra, trained

import spectra_jax
from spectra_jax import cli
from spectra_jax.errors import UserError

PROMPT = "the whale said"
OPTIONS = ("--tokens=4", "--temperature=0")


@pytest.fixture(scope="module")
def model():
    """The model of the command."""
    return spectra_jax.load(str(trained(*TERNARY)))


def run(*arguments: str) -> None:
    """The command, in this process."""
    cli.run(["generate", f"--checkpoint={trained(*TERNARY)}", *OPTIONS, *arguments])


def expected(model, prompt: str, **options) -> str:
    """The prompt and what follows."""
    return prompt + model.generate([prompt], **{"max_new_tokens": 4, "temperature": 0} | options)[0].text


def test_a_prompt(model):
    """In a process of its own: the text alone on stdout, speed on stderr."""
    done = spectra(
        f"--checkpoint={trained(*TERNARY)}", f"--prompt={PROMPT}", *OPTIONS, module="spectra_jax.generate"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(model, PROMPT) + "\n"
    assert done.stderr.splitlines()[-1].startswith("prefill 3 tokens, ") and "; decode 3 tokens, " in done.stderr


def test_every_option_arrives(model, capsys):
    options = {
        "temperature": 1.5, "top_k": 100, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 7,
        "max_new_tokens": 9, "stop": ["xyz", "whale"],
    }
    names = {"max_new_tokens": "tokens"}
    arguments = [f"--{names.get(k, k).replace('_', '-')}={v}" for k, v in options.items() if k != "stop"]
    run(f"--prompt={PROMPT}", *arguments, "--stop=xyz", "--stop=whale", "--cache=int8")
    small = spectra_jax.load(str(trained(*TERNARY)), cache="int8")
    assert capsys.readouterr().out == expected(small, PROMPT, **options) + "\n"
    for name, plain in (("temperature", 0.1), ("top_k", 1), ("seed", 8), ("max_new_tokens", 2)):
        assert expected(small, PROMPT, **options | {name: plain}) != expected(small, PROMPT, **options)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file(model, tmp_path, capsys, name):
    prompts = [PROMPT, 'a "captain"', "naïve"]
    lines = prompts if name.endswith("txt") else [json.dumps({"id": n, "prompt": p}) for n, p in enumerate(prompts)]
    (tmp_path / name).write_text("\n\n".join(lines) + "\n", "utf-8")
    run(f"--prompts={tmp_path / name}")
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    for prompt, line, one in zip(prompts, found, model.generate(prompts, max_new_tokens=4, temperature=0), strict=True):
        assert line == {"prompt": prompt, "text": one.text, "tokens": len(one.tokens), "reason": one.reason}
    assert "prefill" in err


def test_the_standard_input(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    run()
    assert capsys.readouterr().out == expected(model, PROMPT) + "\n"


def test_a_conversation(model, monkeypatch, capsys):
    """On a terminal: every line is continued, a mistake does not end it, the end of the input does."""
    ours, theirs = os.openpty()
    os.write(ours, f"{PROMPT}\n\n{'the whale ' * 20}\na\n".encode() + b"\x04")
    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        run()
    os.close(ours)
    out, err = capsys.readouterr()
    assert out == f"> {expected(model, PROMPT)}\n> > > {expected(model, 'a')}\n> \n"
    assert "error: " in err and "exceed the context of 16" in err and err.count("prefill") == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "prompts.jsonl holds no prompt; write one a line"),
        ('{"prompt": "a"}\n\nhello', 'prompts.jsonl, line 3 is not JSON like {"prompt": "The people of"}'),
        ('{"text": "a"}', "prompts.jsonl, line 1 is not JSON like"),
        ('"a"', "prompts.jsonl, line 1 is not JSON like"),
        ('{"prompt": 3}', "prompts.jsonl, line 1: the prompt is 3; it must be a text that is not empty"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        run(f"--prompts={path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts=nowhere.txt"], "--prompts=nowhere.txt cannot be read: .*No such file"),
        (["--prompt=a", "--prompts=b"], "--prompt and --prompts are both given; use one of them"),
        (["--prompt="], "the prompt is empty"),
        (["--prompt=a", "--top-p=2"], "top_p=2.0 must be above 0 and at most 1"),
        (["--prompt=a", "--cache=int4"], "cache='int4' is not one of auto, int8"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        run(*arguments)


def test_one_device_is_enough(model):
    """Of eight."""
    assert len(jax.devices()) == 8 and model.mesh.devices.size == 1
