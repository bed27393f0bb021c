"""The command line: `spectra COMMAND`, which is also `python -m spectra_jax.COMMAND`."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NoReturn

from spectra_jax.errors import Stopped, UserError

CONFIG_PREFIX = "--config."
STOPPED = os.EX_TEMPFAIL  # 75: nothing is wrong, try again


def main(command: str | None = None) -> None:
    """Runs `command` (or the one named first on the command line) and exits.

    Exit status: 0; 2 with one message where what the user gave cannot work; STOPPED where a signal ended a run that
    the same command continues.
    """
    arguments = ([command] if command else []) + sys.argv[1:]
    # The C++ libraries under JAX log every notable thing on stderr, in the midst of the progress line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        run(arguments)
        sys.stdout.flush()  # a reader that has gone away is noticed here and not when Python shuts down
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(arguments: Sequence[str]) -> None:
    """Parses and executes one command line.

    Raises:
      UserError: an unknown argument (the message names the nearest), or whatever the command raises.
    """
    parser, commands = _parser()
    if arguments and not arguments[0].startswith("-"):
        _check_names(arguments, commands)
    args, rest = parser.parse_known_args(arguments)
    overrides = [text.removeprefix(CONFIG_PREFIX) for text in rest if text.startswith(CONFIG_PREFIX)]
    unknown = [text for text in rest if not text.startswith(CONFIG_PREFIX)]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; see spectra {args.command} --help")
    args.overrides = overrides
    args.execute(args)


def _check_names(arguments: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Refuses a misspelt command or option, before argparse complains of what is missing because of it."""
    command, *rest = arguments
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
        raise UserError(f"unknown command {command!r}; {hint}")
    options = list(commands[command]._option_string_actions)
    for text in rest:
        name, equals, _ = text.partition("=")
        if name.startswith(CONFIG_PREFIX) and commands[command].get_default("takes_config"):
            if not equals:
                raise UserError(f"{name} has no value; write {name}=VALUE")
        elif name.startswith("--") and " " not in name and name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see spectra {command} --help"
            raise UserError(f"unknown argument {text!r}; {hint}")


def train(args: argparse.Namespace) -> None:
    from spectra_jax import config, distributed
    from spectra_jax.train.loop import train

    settings = config.load(args.config, args.overrides)
    with distributed.joined(settings.train.heartbeat_seconds) if args.distributed else nullcontext():
        train(settings, args.workdir, accept_changes=args.accept_changes)


def sweep(args: argparse.Namespace) -> None:
    from spectra_jax.sweep import run_sweep, table

    print(table(run_sweep(args.sweep, args.workdir, args.overrides)))


def prepare(args: argparse.Namespace) -> None:
    from spectra_jax.data.prepare import prepare

    manifest = prepare(
        args.sources, args.out, tokenizer=args.tokenizer, T=args.context, licence=args.licence,
        validation_percent=args.validation_percent, text_key=args.text_key, separator=args.separator,
        workers=args.workers, overwrite=args.overwrite, eod=args.eod, part_bytes=args.part_bytes,
        train_bytes=args.train_bytes,
    )
    for name, split in manifest.splits.items():
        print(
            f"{args.out}: {name} {split.documents:,} documents, {split.tokens:,} tokens in {split.records:,} records "
            f"of {manifest.T} (+1), {split.bytes / max(split.tokens, 1):.2f} bytes per token"
        )


def evaluate(args: argparse.Namespace) -> None:
    from spectra_jax.evaluate.report import evaluate_checkpoint

    print(evaluate_checkpoint(args.checkpoint, args.sets, args.split, args.sequences))


def generate(args: argparse.Namespace) -> None:
    import jax

    from spectra_jax.serve.generate import complete
    from spectra_jax.serve.load import load

    text = complete(
        load(args.checkpoint, devices=jax.devices()[:1]), args.prompt, new_tokens=args.tokens,
        temperature=args.temperature, top_k=args.top_k, seed=args.seed,
    )
    print(text)


def import_(args: argparse.Namespace) -> None:
    from spectra_jax.interop.importing import import_model

    print(import_model(
        args.model, args.out, weight=args.weight, scale_shards=args.scale_shards, tokenizer=args.tokenizer
    ))


def export(args: argparse.Namespace) -> None:
    from spectra_jax.interop import hf

    print(hf.export(args.checkpoint, args.out, dtype=args.dtype))


def plot(args: argparse.Namespace) -> None:
    from spectra_jax.analysis.plots import plot_runs

    plot_runs(args.workdirs, args.out, x=args.x, smooth=args.smooth)
    print(args.out)


def checkpoints(args: argparse.Namespace) -> None:
    from spectra_jax.verify import table

    print(table(args.workdir))


def verify(args: argparse.Namespace) -> None:
    from spectra_jax.verify import verify

    print(verify(args.workdir))


def suite(args: argparse.Namespace) -> None:
    from spectra_jax.suite import table

    print(table())


def quickstart(args: argparse.Namespace) -> None:
    from spectra_jax.quickstart import run

    run(args.workdir)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage of a whole command."""
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands."""
    top = _Parser(
        prog="spectra", description="Pretrain, evaluate and compare language models whose bit-width is a config value."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(execute: Callable, help: str, epilog: str = "", takes_config: bool = False) -> Callable:
        parser = commands.add_parser(
            execute.__name__.rstrip("_"), help=help, description=help, epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(execute=execute, takes_config=takes_config)
        return parser.add_argument

    overrides = (
        "Any value of the config is changed by --config.SECTION.KEY=VALUE, for example --config.train.steps=100\n"
        "--config.data.batch=64 --config.mesh.model=2; a wrong key is answered with the nearest known one.\n"
        "The keys with their defaults and meanings are the dataclasses of spectra_jax/schema.py."
    )
    arg = add(
        train, "Pretrain a model, or resume it.", overrides + "\n\nExample:\n  spectra train "
        "--config=configs/trilm.py:99m --workdir=runs/tri --config.data.sets=data/web=3,data/books=1", True,
    )
    arg("--config", required=True, metavar="FILE.py[:ARG]", help="config file and the argument of its get_config")
    arg("--workdir", required=True, help="folder of the run; one that holds this run already is resumed")
    arg("--accept-changes", action="store_true", help="resume although config or data differ from the run's")
    arg("--distributed", action="store_true", help="one of several processes of this run: TPU pod slices, Slurm steps, "
        "MPI and Kubernetes jobs are recognised; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES "
        "and JAX_PROCESS_ID")

    arg = add(sweep, "Train every row of a sweep, skipping finished ones, and draw them.", overrides, True)
    arg("--sweep", required=True, metavar="FILE.py[:ARG]", help="sweep file and the argument of its get_sweep")
    arg("--workdir", required=True, help="folder of the sweep: one subfolder per row")

    arg = add(
        prepare, "Tokenize text into a prepared set: fixed-length records in ArrayRecord shards.",
        "Sources: .txt, .jsonl (also .gz .xz .zst), .parquet, folders and globs of these, a Hugging Face dataset\n"
        "folder, tfds:NAME[:SPLIT]. Killed? The same command resumes, and gives the same bytes.\n\nExample:\n"
        "  spectra prepare corpus/*.jsonl.zst --out=data/web --tokenizer=train:8192 --licence=CC0",
    )
    arg("sources", nargs="+", help="files, folders, globs or TFDS names")
    arg("--out", required=True, help="folder of the prepared set")
    arg("--tokenizer", required=True, help="neox, neox:FILE, a tokenizer.json, or train:N for a new BPE of N entries")
    arg("--context", type=int, default=2048, help="tokens per sequence, T (default %(default)s)")
    arg("--validation-percent", type=float, default=1.0, help="documents held out, by hash (default %(default)s)")
    arg("--licence", default="unknown", help="licence of the texts, kept in the manifest")
    arg("--text-key", default="text", help="field that holds the text (default %(default)s)")
    arg("--separator", default="<|endoftext|>", help="line that ends a document in .txt (default %(default)s)")
    arg("--eod", default=None, help="name of the end-of-document token, where the tokenizer has none of the usual ones")
    arg("--part-bytes", type=int, default=16 << 20, help="text per shard (default %(default)s)")
    arg("--train-bytes", type=int, default=64 << 20, help="text a train:N tokenizer learns from (default %(default)s)")
    arg("--workers", type=int, default=None, help="processes (default: one per core)")
    arg("--overwrite", action="store_true", help="replace a prepared set made with other settings")

    arg = add(evaluate, "Loss, perplexity and bits per byte of a checkpoint on prepared sets.")
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--sets", nargs="*", default=None, help="prepared sets (default: those the model was trained on)")
    arg("--split", default="validation", help="split of the sets (default %(default)s)")
    arg("--sequences", type=int, default=None, help="at most so many sequences per set (default: all)")

    arg = add(generate, "Complete a prompt.")
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--prompt", required=True, help="text to continue")
    arg("--tokens", type=int, default=64, help="new tokens at most (default %(default)s)")
    arg("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default %(default)s)")
    arg("--top-k", type=int, default=40, help="choose among so many; 0 for all (default %(default)s)")
    arg("--seed", type=int, default=0, help="of the random choices (default %(default)s)")

    arg = add(import_, "Make a run of another format's Llama-shaped model: evaluate, generate and export take it.",
              "Example:\n  spectra import models/SmolLM2-135M --out=runs/smollm2")
    arg("model", help="a Hugging Face folder (config.json, *.safetensors, tokenizer.json), or a .gguf file")
    arg("--out", required=True, help="folder of the run; it must not exist")
    arg("--weight", default="float", help="float, or what the matrices hold already: ternary, binary (default float)")
    arg("--scale-shards", type=int, default=1, help="scales per quantized matrix (default %(default)s)")
    arg("--tokenizer", default=None, metavar="FILE", help="a tokenizer.json in place of the model's own")

    arg = add(export, "Write a checkpoint in another format: hf is a folder that transformers loads as a Llama.")
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--to", required=True, choices=["hf"], help="the format")
    arg("--out", required=True, help="folder to write; it must not exist")
    arg("--dtype", default="float32", help="float32, bfloat16 or float16 (default %(default)s)")

    arg = add(plot, "Draw the loss curves of runs over each other.")
    arg("workdirs", nargs="+", help="folders of runs")
    arg("--out", default="loss.png", help=".png, .pdf or .svg (default %(default)s)")
    arg("--x", default="tokens", help="tokens or step (default %(default)s)")
    arg("--smooth", type=float, default=0.02, help="share of the curve to average over (default %(default)s)")

    run = {"metavar": "WORKDIR[@STEP]", "help": "folder of the run, by default with all its checkpoints"}
    arg = add(checkpoints, "List the checkpoints of a run: step, tokens, loss, size, whether their checksums hold.")
    arg("workdir", **run)
    arg = add(verify, "Read every checkpoint of a run and compare each array with its checksum.")
    arg("workdir", **run)

    add(suite, "Print the published suite: sizes, learning rates, sizes in bits.")
    arg = add(quickstart, "Train a FloatLM and a TriLM on the shipped corpus and compare them, in minutes on a CPU.")
    arg("--workdir", default="runs/quickstart", help="where everything goes (default %(default)s)")
    return top, commands.choices


if __name__ == "__main__":
    main()
