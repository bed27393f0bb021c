"""The arguments of every command of `spectra`, and the help that tells of them.

`add` makes a command of a name and help, and gives the function that adds an argument to it (parser.py).
"""

from collections.abc import Callable


def making_models(add: Callable) -> None:
    """train, sweep, quickstart, prepare, import."""
    overrides = (
        "Any value of the config is changed by --config.SECTION.KEY=VALUE, for example --config.train.steps=100\n"
        "--config.data.batch=64 --config.mesh.model=2; a wrong key is answered with the nearest known one.\n"
        "The keys with their defaults and meanings are the dataclasses of spectra_jax/schema.py."
    )
    arg = add(
        "train", "Pretrain a model, or resume it.", overrides + "\n\nExample:\n  spectra train "
        "--config=configs/trilm.py:99m --workdir=runs/tri --config.data.sets=data/web=3,data/books=1", True,
    )
    arg("--config", required=True, metavar="FILE.py[:ARG]", help="config file and the argument of its get_config")
    arg("--workdir", required=True, help="folder of the run; one that holds this run already is resumed")
    arg("--accept-changes", action="store_true", help="resume although config or data differ from the run's")
    arg("--distributed", action="store_true", help="one of several processes of this run: TPU pod slices, Slurm steps, "
        "MPI and Kubernetes jobs are recognised; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES "
        "and JAX_PROCESS_ID")

    arg = add("sweep", "Train every row of a sweep, skipping finished ones, and draw them.", overrides, True)
    arg("--sweep", required=True, metavar="FILE.py[:ARG]", help="sweep file and the argument of its get_sweep")
    arg("--workdir", required=True, help="folder of the sweep: one subfolder per row")

    arg = add("quickstart", "Train a FloatLM and a TriLM on the shipped corpus, quantize, compare: minutes on a CPU.")
    arg("--workdir", default="runs/quickstart", help="where everything goes (default %(default)s)")

    arg = add(
        "prepare", "Tokenize text into a prepared set: fixed-length records in ArrayRecord shards.",
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

    arg = add("import", "Make a run of another format's Llama-shaped model: evaluate, generate and export take it.",
              "Example:\n  spectra import models/SmolLM2-135M --out=runs/smollm2")
    arg("model", help="a Hugging Face folder (config.json, *.safetensors, tokenizer.json), or a .gguf file")
    arg("--out", required=True, help="folder of the run; it must not exist")
    arg("--weight", default="float", help="float, or what the matrices hold already: ternary or binary codes "
        "(default %(default)s)")
    arg("--scale-shards", type=int, default=1, help="scales per quantized matrix (default %(default)s)")
    arg("--tokenizer", default=None, metavar="FILE", help="a tokenizer.json in place of the model's own")


def changing_models(add: Callable) -> None:
    """quantize, prune, delta."""
    quantize = add(
        "quantize", "Make a quantized run of a float one: evaluate, generate and export take it.",
        "The presets are in configs/quantlm.py. Killed? The same command goes on after the last finished layer.\n\n"
        "Example:\n  spectra quantize --checkpoint=runs/flt --config=configs/quantlm.py:3bit --out=runs/flt-3bit",
        True,
    )
    prune = add(
        "prune", "Make a smaller float run of a float one, with fewer heads and channels in every layer.",
        "The criteria are in configs/pruned.py; configs/finetune.py trains what is left.\n\nExample:\n"
        "  spectra prune --checkpoint=runs/flt --config=configs/pruned.py --config.prune.ratio=0.25 --out=runs/cut",
        True,
    )
    delta = add(
        "delta", "Make a run of a base and a compressed delta to a fine-tuned model, or of two checkpoints of one run.",
        "The presets are in configs/delta.py. What SpIEL tuned (configs/spiel.py) is a file by itself, from which the\n"
        "base makes the same run again, bit for bit.\n\nExamples:\n"
        "  spectra delta runs/flt runs/flt-tuned --config=configs/delta.py --out=runs/flt-delta\n"
        "  spectra delta runs/flt runs/flt-spiel --sparse --out=spiel.npz\n"
        "  spectra delta runs/flt spiel.npz --sparse --out=runs/flt-spiel-again",
        True,
    )
    delta("base", metavar="BASE[@STEP]", help="the float run that is added to, by default its newest step")
    delta("finetuned", metavar="FINETUNED[@STEP]", help="one of its shape and tokenizer, which the sum approaches; "
          "with --sparse also a file that --sparse wrote")
    delta("--sparse", action="store_true", help="8 bytes for each weight that differs, and nothing lost")
    for arg in (quantize, prune):
        arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a float run, by default its newest step")
    for arg in (quantize, prune, delta):
        arg("--config", required=arg is not delta, metavar="FILE.py[:ARG]",
            help="config file and the argument of its get_config")
        arg("--out", required=True, help="what to make, the folder of a run but for --sparse; it must not exist"
            if arg is delta else "folder of the run to make; it must not exist")


def using_models(add: Callable) -> None:
    """evaluate, harness, generate, export."""
    arg = add(
        "evaluate", "Perplexity of a checkpoint on prepared sets and texts; its answers to questions.",
        "Example:\n  spectra evaluate --checkpoint=runs/tri --texts essays.txt --tasks agreement.jsonl --limit=100\n"
        "The kinds of questions are described at the head of spectra_jax/evaluate/tasks.py.",
    )
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--sets", nargs="*", default=None, help="prepared sets (default: those the model was trained on)")
    arg("--split", default="validation", help="split of the sets (default %(default)s)")
    arg("--sequences", type=int, default=None, help="at most so many sequences per set (default: all)")
    arg("--texts", nargs="*", default=(), metavar="FILE", help="whole documents: .txt, .jsonl and what prepare reads")
    arg("--text-key", default="text", help="field that holds the text (default %(default)s)")
    arg("--context", type=int, default=None, help="tokens that a window of a text reads (default: the model's)")
    arg("--stride", type=int, default=None, help="tokens from window to window (default: half the context)")
    arg("--tasks", nargs="*", default=(), metavar="FILE.jsonl", help="questions answered by log-likelihood")
    arg("--limit", type=int, default=None, help="at most so many items per task (default: all)")
    arg("--weights", default="dense", help="dense, or packed: by the packed product, as generate has it (default "
        "%(default)s)")

    arg = add(
        "harness", "Run tasks of lm-evaluation-harness on a checkpoint.",
        "Example:\n  spectra harness --checkpoint=runs/tri --tasks=paper --beside=TriLM-1.1B --out=tri.json",
    )
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--tasks", required=True, metavar="A,B", help="names of tasks, or paper: the thirteen of Spectra, zero-shot")
    arg("--include", default=None, metavar="FOLDER", help="tasks of your own: a folder of .yaml files")
    arg("--limit", type=int, default=None, help="at most so many items per task (default: all)")
    arg("--shots", type=int, default=None, help="examples in the prompt (default: the task's; 0 with paper)")
    arg("--out", default=None, metavar="FILE.json", help="file for the results")
    arg("--beside", default=None, metavar="MODEL", help="published results to print beside, such as TriLM-1.1B")

    arg = add(
        "generate", "Continue a prompt, each line of a file, or what is typed.",
        "Text is printed as it comes, of a file a line of JSON for each prompt; tokens per second on stderr.\n\n"
        "Example:\n  spectra generate --checkpoint=runs/tri --prompt=\"The people of\" --temperature=0",
    )
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--prompt", default=None, help="text to continue (default: what is typed, or the standard input)")
    arg("--prompts", default=None, metavar="FILE", help='texts to continue: one a line, or .jsonl with "prompt"')
    arg("--tokens", type=int, default=64, help="new tokens at most (default %(default)s)")
    arg("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default %(default)s)")
    arg("--top-k", type=int, default=40, help="choose among so many; 0 for all (default %(default)s)")
    arg("--top-p", type=float, default=1.0, help="choose among the likeliest with so much probability together "
        "(default %(default)s)")
    arg("--min-p", type=float, default=0.0, help="choose among those with so much of the likeliest's probability "
        "(default %(default)s)")
    arg("--repetition-penalty", type=float, default=1.0, help="above 1, tokens of prompt and output get less likely "
        "(default %(default)s)")
    arg("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    arg("--seed", type=int, default=0, help="of the random choices; of a file's next line the next (default "
        "%(default)s)")
    arg("--weights", default="dense", help="dense, or packed: ternary and binary matrices multiplied at 2 bits (or a "
        "kernel by name: tpu, gpu, cpu, xla; default %(default)s)")
    arg("--head", default="dense", help="dense, or int8: the last matrix in 8 bits, on CPUs (default %(default)s)")
    arg("--cache", default="auto", help="keys and values: auto, or int8 to save memory (default %(default)s)")
    arg("--model-parallel", type=int, default=1, metavar="N", help="devices that share a matrix (default %(default)s)")

    arg = add("pack", "Make a run of a ternary, binary or quantized one that is as small as its bits.",
              "Example:\n  spectra pack --checkpoint=runs/tri --out=runs/tri-packed --trits")
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--out", required=True, help="folder of the run to make; it must not exist")
    arg("--trits", action="store_true", help="ternary codes at 1.6 bits instead of 2")
    arg("--dtype", default="float16", help="of embedding, head and gains: float16, bfloat16, float32 (default "
        "%(default)s)")

    arg = add("export", "Write a checkpoint as a folder that transformers loads, or as a file for llama.cpp.",
              "hf: plain weights, a quantized matrix as scale times code. gptq: a QuantLM's matrices packed, as GPTQ\n"
              "checkpoints have them; transformers reads that with the packages optimum and gptqmodel. gguf: one file\n"
              "for llama.cpp, ternary and binary codes exactly in 2 bits (TQ2_0) or 1.6 (TQ1_0).\n\n"
              "Example:\n  spectra export --checkpoint=runs/tri --to=gguf --type=TQ2_0 --out=tri.gguf")
    arg("--checkpoint", required=True, metavar="WORKDIR[@STEP]", help="a run, by default its newest checkpoint")
    arg("--to", required=True, choices=["hf", "gptq", "gguf"], help="the format")
    arg("--out", required=True, help="folder (gguf: file) to write; it must not exist")
    arg("--dtype", default=None, help="hf and gptq: float32, bfloat16 or float16 (default float32)")
    arg("--type", default=None, help="gguf: of the blocks' matrices: TQ2_0, TQ1_0, Q8_0, F16 or F32 (default TQ2_0)")
    arg("--embedding-type", default=None, help="gguf: Q8_0, F16 or F32 (default Q8_0)")
    arg("--head-type", default=None, help="gguf: Q8_0, F16 or F32 (default Q8_0); a tied head is the embedding")


def looking_at_runs(add: Callable) -> None:
    """compare, plot, checkpoints, verify, plan, suite."""
    arg = add("compare", "Quality against size in bits of any runs, as one table and one picture.",
              "Example:\n  spectra compare runs/flt runs/flt-3bit runs/tri --sets data/web --out=bits.png")
    arg("checkpoints", nargs="+", metavar="WORKDIR[@STEP]", help="runs, by default the newest checkpoint of each")
    arg("--sets", nargs="*", default=(), help="one prepared set (default: the first that each model was trained on)")
    arg("--texts", nargs="*", default=(), help="texts instead of a prepared set")
    arg("--context", type=int, default=None, help="tokens that a window of a text reads (default: the model's)")
    arg("--stride", type=int, default=None, help="tokens between windows (default: half the context)")
    arg("--out", default=None, help=".png, .pdf or .svg for the picture (default: none)")

    arg = add("plot", "Draw the loss curves of runs over each other.")
    arg("workdirs", nargs="+", help="folders of runs")
    arg("--out", default="loss.png", help=".png, .pdf or .svg (default %(default)s)")
    arg("--x", default="tokens", help="tokens or step (default %(default)s)")
    arg("--smooth", type=float, default=0.02, help="share of the curve to average over (default %(default)s)")

    run = {"metavar": "WORKDIR[@STEP]", "help": "folder of the run, by default with all its checkpoints"}
    arg = add("checkpoints", "List the checkpoints of a run: step, tokens, loss, size, whether their checksums hold.")
    arg("workdir", **run)
    arg = add("verify", "Read every checkpoint of a run and compare each array with its checksum.")
    arg("workdir", **run)

    arg = add(
        "plan", "Whether a config fits accelerators that are not here, what crosses devices, the bound on its speed.",
        "Examples:\n  spectra plan --config=configs/trilm.py:3.9b --topology=v5p:4x4x4 --compile \\\n"
        "               --config.data.batch=512 --config.model.remat=full\n"
        "  spectra plan --config=configs/trilm.py:3.9b --topology=v5e-16 --topology=h100:8 --search", True,
    )
    arg("--config", required=True, metavar="FILE.py[:ARG]", help="config file and the argument of its get_config")
    arg("--topology", required=True, action="append", metavar="v5p:4x4x4", help="slices by family and chips a side, "
        "an accelerator type such as v5p-128, or GPUs of a node such as h100:8; *2 after it for two slices or nodes; "
        "may be given again")
    arg("--compile", action="store_true", help="compile the real step by libtpu: a minute or two")
    arg("--search", action="store_true", help="try meshes, remat and microbatches, and rank what fits")
    arg("--serve", action="store_true", help="generation instead: weights, cache, bound on tokens per second")
    arg("--price", type=float, default=0.0, help="of a chip for an hour")

    add("suite", "Print the published suite: sizes, learning rates, sizes in bits.")


def analysing(add: Callable) -> None:
    """analyze, report."""
    arg = add(
        "analyze", "One of the paper's figures from runs, or from the published numbers where no run is named.",
        "scaling     laws of loss against size        deployment  what fits where, how fast it decodes\n"
        "bits        loss against bits                hardware    memory and bandwidth of accelerators over the years\n"
        "suite       gaps, schedule, QuantLMs, laws   published   every table of the papers\n"
        "weights     entropies, codes, scales         training    loss curves, where the time went\n"
        "dynamics    weights and the loss around them, over the checkpoints of one run\n"
        "axes        capacity, alignment and efficiency: measured where files are named, kept in the runs' folders\n\n"
        "Examples:\n  spectra analyze suite runs/mini --out=figures\n  spectra analyze scaling\n"
        "  spectra analyze deployment --config=configs/trilm.py:3.9b --device=H100 --device=\"TPU v5e\"\n"
        "  spectra analyze axes runs/mini --texts wiki.txt --tasks winogrande.jsonl --alignment bbq.jsonl --out=axes",
        True,
    )
    arg("name", help="the analysis, see below")
    arg("runs", nargs="*", metavar="WORKDIR[@STEP]", help="runs, or the folders of sweeps")
    arg("--out", default=None, metavar="DIR", help="folder for tables (.csv) and figures (.png)")
    arg("--form", default=None, help="scaling, bits: offset, power or joint")
    arg("--x", default=None, help="scaling, bits: parameters, linear, stored_bits, block_bits or paper_bits")
    arg("--method", default=None, help="scaling: lm (least squares) or huber")
    arg("--shared", default=None, nargs="+", help="scaling: constants that all families share: alpha, beta, E")
    arg("--batches", type=int, default=None, help="dynamics: batches that gradients are taken on")
    arg("--device", default=None, action="append", help="deployment: an accelerator; may be repeated")
    arg("--context", type=int, default=None, help="deployment: tokens of a sequence that are cached")
    arg("--sequences", type=int, default=None, help="deployment: sequences that are cached")
    arg("--config", default=None, metavar="FILE.py[:ARG]", help="deployment: a model of your own")
    arg("--task", default=None, help="published: a benchmark, such as lambada")
    arg("--metric", default=None, help="published: its metric, such as acc")
    arg("--own", default=None, nargs="+", metavar="FILE.json", help="published: results of one's own, as spectra "
        "harness --out wrote them, in the same figure")
    arg("--texts", default=None, nargs="+", metavar="FILE", help="axes: whole documents, as spectra evaluate's")
    arg("--tasks", default=None, nargs="+", metavar="FILE.jsonl", help="axes: questions, as spectra evaluate's")
    arg("--alignment", default=None, nargs="+", metavar="FILE.jsonl", help="axes: questions of truthfulness and bias "
        "(spectra_jax/evaluate/alignment.py; converters.py makes them of published files)")
    arg("--limit", type=int, default=None, help="axes: items of each task, at most")
    arg("--weights", default=None, help="axes: dense, or packed for the speed of ternary and binary models")

    arg = add("report", "Everything known of some runs in one HTML file.",
              "Example:\n  spectra report runs/mini --out=mini.html")
    arg("runs", nargs="+", metavar="WORKDIR[@STEP]", help="runs, or the folders of sweeps")
    arg("--out", default="report.html", help="the file (default %(default)s)")
    arg("--title", default="", help="its title (default: the names of the folders)")
    arg("--dynamics", default="", metavar="WORKDIR", help="the run whose checkpoints are looked into (default: the "
        "first that kept three or more, a TriLM if there is one)")
