"""The command line: `spectra COMMAND`, which is also `python -m spectra_jax.COMMAND`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from spectra_jax.errors import Stopped, UserError
from spectra_jax.parser import parse

STOPPED = os.EX_TEMPFAIL  # 75: nothing is wrong, try again


def main(command: str | None = None) -> None:
    """Runs `command` (or the one named first on the command line) and exits; with what status, `exit_status` says."""
    arguments = ([command] if command else []) + sys.argv[1:]
    # The C++ libraries under JAX log every notable thing on stderr, in the midst of the progress line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with exit_status():
        run(arguments)
        sys.stdout.flush()  # a reader that has gone away is noticed here and not when Python shuts down


@contextmanager
def exit_status() -> Iterator[None]:
    """Exits with 2 and one message where what the user gave cannot work; with STOPPED where a signal ended a run that
    the same command continues."""
    try:
        yield
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
    args = parse(arguments)
    COMMANDS[args.command](args)


def train(args: argparse.Namespace) -> None:
    from spectra_jax import config, distributed
    from spectra_jax.train.loop import train

    settings = config.load(args.config, args.overrides)
    with distributed.Joined(settings.train.heartbeat_seconds) if args.distributed else nullcontext():
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

    print(evaluate_checkpoint(
        args.checkpoint, args.sets, args.split, args.sequences, texts=args.texts, context=args.context,
        stride=args.stride, text_key=args.text_key, tasks=args.tasks, limit=args.limit, weights=args.weights,
    ))


def harness(args: argparse.Namespace) -> None:
    from spectra_jax.evaluate.harness import evaluate_harness

    print(evaluate_harness(
        args.checkpoint, args.tasks.split(","), include=args.include, limit=args.limit, shots=args.shots, out=args.out,
        beside=args.beside,
    ))


def generate(args: argparse.Namespace) -> None:
    import jax

    from spectra_jax.serve import terminal
    from spectra_jax.serve.generate import Generator
    from spectra_jax.serve.load import load

    if args.prompt is not None and args.prompts is not None:
        raise UserError("--prompt and --prompts are both given; use one of them")
    prompts = None if args.prompts is None else terminal.read_prompts(args.prompts)
    options = {
        "max_new_tokens": args.tokens, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
        "min_p": args.min_p, "repetition_penalty": args.repetition_penalty, "stop": args.stop, "seed": args.seed,
    }
    n = args.model_parallel
    loaded = load(args.checkpoint, devices=jax.devices()[:n], model_parallel=n)
    model = Generator(loaded, weights=args.weights, head=args.head, cache=args.cache, release=True)
    if prompts is not None:
        terminal.write_all(model, prompts, options)
    elif args.prompt is None and sys.stdin.isatty():
        terminal.converse(model, options)
    else:
        terminal.write(model, sys.stdin.read().rstrip("\n") if args.prompt is None else args.prompt, options)


def import_(args: argparse.Namespace) -> None:
    from spectra_jax.interop.importing import import_model

    print(import_model(
        args.model, args.out, weight=args.weight, scale_shards=args.scale_shards, tokenizer=args.tokenizer
    ))


def quantize(args: argparse.Namespace) -> None:
    from spectra_jax import config
    from spectra_jax.quantize.pipeline import quantize

    if others := [text for text in args.overrides if not text.startswith(("quantize.", "name="))]:
        raise UserError(f"--config.{others[0]}: model and data are the checkpoint's; config.quantize.* and config.name "
                        "are what can be set here")
    print(quantize(args.checkpoint, config.load(args.config, args.overrides), args.out))


def prune(args: argparse.Namespace) -> None:
    from spectra_jax import config
    from spectra_jax.prune.pipeline import prune

    if others := [text for text in args.overrides if not text.startswith(("prune.", "name="))]:
        raise UserError(f"--config.{others[0]}: model and data are the checkpoint's; config.prune.* and config.name "
                        "are what can be set here")
    print(prune(args.checkpoint, config.load(args.config, args.overrides), args.out))


def delta(args: argparse.Namespace) -> None:
    from spectra_jax import config, sparse_delta
    from spectra_jax.quantize.delta import compress

    if (args.config is None) != args.sparse:
        raise UserError("spectra delta takes --config=configs/delta.py[:PRESET], or --sparse for what SpIEL tuned")
    if args.sparse:
        make = sparse_delta.apply if os.path.isfile(args.finetuned) else sparse_delta.extract
        print(make(args.base, args.finetuned, args.out))
        return
    if others := [text for text in args.overrides if not text.startswith(("quantize.", "name="))]:
        raise UserError(f"--config.{others[0]}: model and data are the checkpoints'; config.quantize.* and config.name "
                        "are what can be set here")
    print(compress(args.base, args.finetuned, config.load(args.config, args.overrides), args.out))


def export(args: argparse.Namespace) -> None:
    types = {"matrices": args.type, "embedding": args.embedding_type, "head": args.head_type}
    types = {name: kind for name, kind in types.items() if kind is not None}
    if args.to == "gguf":
        from spectra_jax.interop import gguf_export

        if args.dtype is not None:
            raise UserError("--dtype is for --to=hf and --to=gptq; for gguf there are --type, --embedding-type and "
                            "--head-type")
        print(gguf_export.export(args.checkpoint, args.out, **types))
        return
    from spectra_jax.interop import hf

    if types:
        raise UserError(f"--type, --embedding-type and --head-type are for --to=gguf; for {args.to} there is --dtype")
    print(hf.export(args.checkpoint, args.out, dtype=args.dtype or "float32", packed=args.to == "gptq"))


def pack(args: argparse.Namespace) -> None:
    from spectra_jax.serve.pack import pack

    print(pack(args.checkpoint, args.out, trits=args.trits, dtype=args.dtype))


def compare(args: argparse.Namespace) -> None:
    from spectra_jax.compare import compare

    print(compare(
        args.checkpoints, args.out, sets=args.sets, texts=args.texts, context=args.context, stride=args.stride
    ))


def plot(args: argparse.Namespace) -> None:
    from spectra_jax.analysis.plots import plot_runs

    plot_runs(args.workdirs, args.out, x=args.x, smooth=args.smooth)
    print(args.out)


def analyze(args: argparse.Namespace) -> None:
    from spectra_jax import config
    from spectra_jax.analyze import analyze

    names = ("form", "x", "method", "shared", "batches", "device", "context", "sequences", "task", "metric", "own",
             "texts", "tasks", "alignment", "limit", "weights")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config is not None:
        options["config"] = config.load(args.config, args.overrides)
    elif args.overrides:
        raise UserError(f"--config.{args.overrides[0]} changes a config; name one with --config=FILE.py[:ARG]")
    print(analyze(args.name, args.runs, args.out, options))


def report(args: argparse.Namespace) -> None:
    from spectra_jax.report import report

    print(report(args.runs, args.out, title=args.title, dynamics=args.dynamics))


def checkpoints(args: argparse.Namespace) -> None:
    from spectra_jax.verify import table

    print(table(args.workdir))


def verify(args: argparse.Namespace) -> None:
    from spectra_jax.verify import verify

    print(verify(args.workdir))


def plan(args: argparse.Namespace) -> None:
    from spectra_jax import config
    from spectra_jax.plan.report import plan, searched
    from spectra_jax.plan.serving import serving

    settings = config.load(args.config, args.overrides)
    if args.serve:
        print(serving(settings, args.topology))
    else:
        print((searched if args.search else plan)(settings, args.topology, compile=args.compile, price=args.price))


def suite(args: argparse.Namespace) -> None:
    from spectra_jax.suite import table

    print(table())


def quickstart(args: argparse.Namespace) -> None:
    from spectra_jax.quickstart import run

    run(args.workdir)


COMMANDS = {
    function.__name__.rstrip("_"): function
    for function in (
        train, sweep, quickstart, prepare, import_, quantize, prune, delta, evaluate, harness, compare, generate, pack,
        export, plot, analyze, report, checkpoints, verify, plan, suite,
    )
}

if __name__ == "__main__":
    main()
