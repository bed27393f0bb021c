"""What a run is: frozen dataclasses with every setting, and the numbers derived from them.

A value that the papers do not state has a comment that says so: it is an assumption of ours, open to change.
"""

from dataclasses import dataclass, field

from spectra_jax.values import parse_set


@dataclass(frozen=True)
class Model:
    """Shape of the transformer and how its matrices are represented (letters as in the README)."""

    V: int = 50304  # rows of the embedding; may exceed the tokenizer's ids (padding)
    D: int = 512
    F: int = 1280
    L: int = 16
    N: int = 8  # query heads
    K: int = 8  # key-value heads; N/K queries share one
    H: int = 64
    mixer: str = "attention"  # what mixes over time: the names in model/transformer.py
    weight: str = "float"  # the weight rule of the block matrices: the names in weights/__init__.py
    scale_shards: int = 1  # scales per matrix, one per model-parallel shard of the original run
    # The released code fuses q, k and v, so their scale was probably shared; the paper does not say.
    share_qkv_scale: bool = False
    share_glu_scale: bool = False  # of gate and up, where a paper's code has them as one matrix
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    quantized_head: bool = False  # the head is a matrix under the weight rule too
    init_std: float = 0.02  # not stated in the paper; the field's usual value
    # GPT-2's 1/sqrt(2L) on the matrices that write to the residual stream; not stated in the paper
    init_residual_scaling: bool = True
    # "auto" is bfloat16 on accelerators and float32 on CPU, where bfloat16 is slower; float16 comes with a loss scale
    compute_dtype: str = "auto"
    # Of the gradients of the blocks' matrices, as a device forms them and as they are added up over devices:
    # "compute", that of activations, or "float32", at twice the bytes. All others always are float32.
    gradient_dtype: str = "compute"
    # What of a quantized matrix goes to the devices that share it: codes at 2 bits, int8, or the matrix, as of floats
    gather: str = "codes"
    attention: str = "causal_blocks"  # or the kernels: "splash" of TPUs, "cudnn" and "flash" of GPUs; "reference"
    attention_blocks: int = 4  # key blocks above the diagonal are not computed
    remat: str = "none"  # none, dots (keep matrix products), full (keep block inputs only)
    unroll: int = 1  # blocks per iteration of the scan over layers; L unrolls it whole

    @property
    def scoring(self) -> int:
        """Heads that score every pair of tokens: none where the mixer is no attention."""
        return self.N if self.mixer == "attention" else 0


@dataclass(frozen=True)
class Data:
    """Which tokens. `sets` are prepared folders, each optionally with a weight: ("web=3", "books=1")."""

    sets: tuple[str, ...] = ()
    T: int = 2048  # tokens per sequence
    batch: int = 512  # sequences per step over all devices
    read_threads: int = 4


@dataclass(frozen=True)
class Train:
    """From where, how long, and what happens when a step goes wrong."""

    tokens: int = 300_000_000_000
    steps: int = 0  # when positive, overrides `tokens`
    start: str = ""  # WORKDIR[@STEP] whose weights training begins with, instead of random ones
    accumulate: int = 1  # microbatches per step
    loss_chunks: int = 8  # the vocabulary-sized logits exist for one chunk of the sequence at a time
    # Skipped steps in a row before the run is given up; those that are not finite always are. With float16 those that
    # its loss scale is to blame for do not count.
    max_skipped: int = 20
    skip_sigma: float = 0.0  # also skip a loss or gradient norm so many deviations above its window (6 is usual); 0: no
    skip_window: int = 128  # steps in that window
    # What multiplies gradients in float16, and there only: at first; at least; doubled after so many steps without an
    # overflow. Not stated in the paper: the defaults of its code base, GPT-NeoX on DeepSpeed (which once began at
    # 2^32). The paper's counts of skipped steps fit this window.
    loss_scale: float = 2.0**16
    loss_scale_min: float = 1.0
    loss_scale_window: int = 1000
    stuck_seconds: float = 3600.0  # without a finished step, compilation or evaluation: show all stacks, exit; 0: never
    heartbeat_seconds: int = 100  # of several processes, one that is silent for so long is dead, and the others end
    # Programs are kept in ~/.cache/spectra_jax/xla, or where JAX_COMPILATION_CACHE_DIR says (GPUs, TPUs, one process)
    compile_cache: bool = True


@dataclass(frozen=True)
class Spiel:
    """Which weights SpIEL tunes (train/spiel.py). The defaults are those of its published code, but for the seed."""

    density: float = 0.01  # tuned weights of a block matrix, as a share of all
    every: int = 20  # updates from one selection to the next
    collect: int = 5  # updates after which the first selection ends; later ones collect one gradient more
    replaced: float = 0.2  # the share that a selection replaces at first, falling to 0; the first of all replaces all
    seed: int = 0  # of the random places that are tuned until the first selection; an assumption


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Betas are the paper's (A.2); the rest is not stated there and holds the field's usual values."""

    name: str = "adamw"  # the names in train/optimizer.py
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm
    weight_decay: float = 0.1
    # Parameters whose path contains one of these are not decayed (not stated in the paper).
    no_decay: tuple[str, ...] = ("norm",)
    # Of parameters whose path contains PART the learning rate is FACTOR times as high: ("PART=FACTOR", ...).
    rates: tuple[str, ...] = ()
    keep_zeros: bool = False  # weights of block matrices that are 0 at the start are never trained (sparsity.py)
    # Of an optimizer with 8-bit states, those that stay in float32: of parameters whose path contains one of these, and
    # of arrays with fewer elements (those of one layer count). 4096 is bitsandbytes' default, and embeddings in float32
    # its advice; the head is our assumption.
    float_states: tuple[str, ...] = ("embedding", "head")
    float_below: int = 4096
    only: tuple[str, ...] = ()  # only parameters whose path contains one of these are trained; empty: all
    spiel: Spiel = field(default_factory=Spiel)  # read where name=spiel


@dataclass(frozen=True)
class Distill:
    """What a run learns from a frozen teacher (TernaryLLM, arXiv 2406.07177), beside or instead of the text.

    The paper's weights, layers and temperature are not known to us: all of these are assumptions.
    """

    teacher: str = ""  # WORKDIR[@STEP] of a model with the same tokenizer; empty: none, and nothing below is read
    next_token: float = 0.0  # weight of the usual loss
    logits: float = 1.0  # of the divergence of the student's next-token distribution from the teacher's
    temperature: float = 1.0  # that both are softened by
    features: float = 1.0  # of 1 - cosine between the residual streams after a block, summed over blocks


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay over training; fractions are of all steps."""

    shape: str = "cosine"  # cosine or linear
    peak: float = 4e-4
    warmup: float = 0.01  # a fraction of all steps below 1, a number of steps from 1 up; not stated
    final: float = 0.0  # of the peak, at the last step; not stated
    # The two interventions of section 3.3, each of which an ablation can switch off.
    lower_peak: bool = False
    lowered_peak: float = 4e-4
    lower_at: float = 0.5
    lowering: str = "jump"  # or "continuous": two straight segments that meet at `lower_at`
    remove_decay: bool = False
    remove_at: float = 2 / 3


@dataclass(frozen=True)
class Mesh:
    """Devices per axis: replicas across slices, fully sharded data parallel, tensor parallel. -1: the rest."""

    slice: int = 1
    data: int = -1
    model: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved. Rolling ones are for resuming, permanent ones are kept."""

    every_steps: int = 1000
    keep: int = 2
    permanent_tokens: int = 10_000_000_000  # one kept for good per so many tokens; 0 for none
    permanent_final: bool = True
    permanent_weights_only: bool = False  # the permanent ones but the last hold parameters and no optimizer state
    # Every full one is read back beside training; older ones go only when a newer one was found sound.
    read_back: bool = True


@dataclass(frozen=True)
class Evaluate:
    """Validation during training, on the validation split of the training sets (never a function of the seed)."""

    every_steps: int = 1000
    batches: int = 20  # 0 for the whole split


@dataclass(frozen=True)
class Metrics:
    """What is written down, and how often."""

    every_steps: int = 10
    weights_every_steps: int = 100  # zeros, flips and scales of quantized matrices; 0 for never
    profile_at: int = 0  # the first step of a trace by JAX's profiler, into WORKDIR/profile; 0 for none
    profile_steps: int = 3  # steps in that trace
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True)
class Quantize:
    """How a trained float model is quantized (`spectra quantize`). Which values a method reads stands in its file."""

    method: str = "none"  # gptq, rtn, ...: the names in spectra_jax/quantize/methods.py
    bits: int = 4  # 2 to 8
    grid: str = "gptq"  # where the levels lie: the names in quantize/grids.py; of a block-wise type, in blockwise.py
    group: int = 128  # inputs that share a scale; 0: all of an output
    alpha: float = 0.5  # SmoothQuant: how much of the activations' range moves into weights; 0.85 for Llama 2 and 3
    mse: bool = False  # search for the range with the smallest error instead of taking the largest magnitude
    scale_dtype: str = "float16"  # scales are rounded to it before codes are taken
    # Calibration. Empty sets: those that the model was trained on. 512 x 2048 tokens is the Spectra paper's (A.1).
    sets: tuple[str, ...] = ()
    samples: int = 512
    seed: int = 0  # of the choice of samples
    batch: int = 8  # samples that run at once
    # Second-order methods. None of these is stated in the paper; they are the defaults of GPTQ's reference.
    damp: float = 0.01  # of the mean of the Hessian's diagonal
    block: int = 128  # inputs between two updates of all that follows
    act_order: bool = False  # inputs with the largest diagonal first
    static_groups: bool = False  # levels of groups before any update
    true_sequential: bool = False  # q, k, v; then o; then gate and up; then down, each seeing those before it quantized
    float64: bool = False  # the solver alone, on the host
    # Pruning and partial binarization: sparsegpt.py, billm.py, pbllm.py.
    sparsity: float = 0.5  # the share of weights that go
    pattern: str = ""  # instead of a share, "2:4": of every 4 inputs in a row, 2 go
    saliency: str = "hessian"  # what makes a weight salient; or "magnitude"
    salient: float = 0.1  # the share of weights that PB-LLM stores in `bits` bits; the others are signs
    # Compressed deltas (`spectra delta`, delta.py): bands of singular vectors, of the largest values first, as
    # BITS:COUNT; 16 bits are floats; "rest" is all that the bits per weight and the matrix's rank leave.
    bands: tuple[str, ...] = ("8:2", "3:32", "2:rest")
    delta_bits: float = 1.0  # of codes per weight of a matrix, at most: the paper's ratio of 1/16; 0: no bound
    base_dtype: str = "float16"  # what the base is stored in; deltas are taken from it as rounded


@dataclass(frozen=True)
class Prune:
    """How a trained float model gets fewer heads and channels (`spectra prune`); defaults are LLM-Pruner's."""

    criterion: str = "none"  # param_first, ...: the names in spectra_jax/prune/importance.py; or "random"
    ratio: float = 0.25  # the share of the channels of attention and of the MLP that go, in every layer
    reduction: str = "sum"  # of a channel's importances in the matrices it runs through; or max, mean, prod, first
    multiple: int = 1  # channels of the MLP are kept in multiples of it, for groups of a quantizer or tiles of a device
    # The text that gradients are taken on. Empty sets: those that the model was trained on.
    sets: tuple[str, ...] = ()
    samples: int = 10
    tokens: int = 64  # of each sample; 0: all
    seed: int = 0  # of the choice of samples, and of "random"


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    family: str = "FloatLM"
    name: str = "run"
    seed: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    distill: Distill = field(default_factory=Distill)
    schedule: Schedule = field(default_factory=Schedule)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    metrics: Metrics = field(default_factory=Metrics)
    quantize: Quantize = field(default_factory=Quantize)
    prune: Prune = field(default_factory=Prune)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the global batch."""
        return self.data.batch * self.data.T

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.steps or -(-self.train.tokens // self.tokens_per_step)

    @property
    def permanent_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints are kept: the first at or past each multiple of `permanent_tokens`."""
        every = self.checkpoint.permanent_tokens
        total = self.steps * self.tokens_per_step
        marks = range(every, total + 1, every) if every else ()
        steps = {-(-mark // self.tokens_per_step) for mark in marks}
        return tuple(sorted(steps | ({self.steps} if self.checkpoint.permanent_final else set())))

    @property
    def mixture(self) -> tuple[tuple[str, float], ...]:
        """The prepared sets with their weights."""
        return tuple(parse_set(text) for text in self.data.sets)
