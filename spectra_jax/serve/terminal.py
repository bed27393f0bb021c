"""`spectra generate`: texts to stdout as they come; on stderr, how fast."""

import json
import sys
from pathlib import Path
from typing import Any

from spectra_jax.errors import UserError
from spectra_jax.serve.generate import Generator


def write(model: Generator, prompt: str, options: dict[str, Any]) -> None:
    """Prints the prompt and what follows it."""
    _warm_up(model, [prompt], options)
    print(prompt, end="", flush=True)
    for piece in model.stream(prompt, **options):
        print(piece, end="", flush=True)
    print(flush=True)
    _report(model)


def write_all(model: Generator, prompts: list[str], options: dict[str, Any]) -> None:
    """Prints a line of JSON for each prompt: prompt, text, number of tokens, reason of the end."""
    _warm_up(model, prompts, options)
    for prompt, found in zip(prompts, model.generate(prompts, **options)):
        line = {"prompt": prompt, "text": found.text, "tokens": len(found.tokens), "reason": found.reason}
        print(json.dumps(line, ensure_ascii=False))
    _report(model)


def converse(model: Generator, options: dict[str, Any]) -> None:
    """Continues each line that is typed, until the end of the input."""
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            if prompt:
                write(model, prompt, options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def read_prompts(path: str) -> list[str]:
    """A prompt a line: as it is, or of a .jsonl the value of "prompt". Empty lines are left out.

    Raises:
      UserError: a file that cannot be read, a line without a prompt, or no lines.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path} cannot be read: {error}") from error
    numbered = [(n, line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts={path} holds no prompt; write one a line")
    as_json = path.endswith(".jsonl")
    return [_prompt_of(line, f"{path}, line {n}") if as_json else line for n, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{where} is not JSON like {{"prompt": "The people of"}}') from error
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{where}: the prompt is {prompt!r}; it must be a text that is not empty")
    return prompt


def _warm_up(model: Generator, prompts: list[str], options: dict[str, Any]) -> None:
    seconds = model.warm_up(prompts, max_new_tokens=options["max_new_tokens"])
    if seconds > 1:
        print(f"compiled in {seconds:.1f} s", file=sys.stderr)
    model.speed = type(model.speed)()


def _report(model: Generator) -> None:
    print(model.speed, file=sys.stderr)
