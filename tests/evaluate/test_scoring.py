"""Log-likelihoods and windows against numpy on the logits of single texts, without batches, padding or sharing."""

import functools
import math

import jax
import numpy as np
import pytest
from helpers import TERNARY, data, spectra, texts, trained

from spectra_jax.errors import UserError
from spectra_jax.evaluate.report import evaluate_checkpoint
from spectra_jax.evaluate.scoring import Score, _rows, encode_pairs, rounded, score
from spectra_jax.evaluate.windows import evaluate_texts, ratio_error, spans, window_pairs
from spectra_jax.model.parameters import apply
from spectra_jax.serve.load import Loaded, load


@pytest.fixture(scope="module")
def model() -> Loaded:
    """A trained model with a context of 16, on one device."""
    return load(str(trained(*TERNARY)), devices=jax.devices()[:1])


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, parameters, tokens):
    """Of one text at a time."""
    return apply(graphdef, parameters)(tokens)


def log_probabilities(model: Loaded, ids: list[int]) -> np.ndarray:
    """Those of what follows each of at most 16 tokens, in float64."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    with jax.set_mesh(model.mesh):
        z = np.asarray(logits(model.graphdef, model.parameters, padded), np.float64)[0, : len(ids)]
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def by_hand(model: Loaded, context: list[int], continuation: list[int]) -> Score:
    """One pair by itself."""
    logp = log_probabilities(model, [*context, *continuation][-17:-1])[-len(continuation) :]
    targets = np.array(continuation)
    return Score(logp[np.arange(len(targets)), targets].sum(), bool((logp.argmax(-1) == targets).all()))


def pairs_of_all_kinds(model: Loaded) -> list[tuple[list[int], list[int]]]:
    """Random lengths, contexts that are too long, one-token choices, continuations that begin others, repetitions."""
    rng = np.random.RandomState(0)
    drawn = [
        (rng.randint(0, 300, n).tolist(), rng.randint(0, 300, m).tolist())
        for n, m in [(1, 1), (3, 5), (15, 1), (16, 1), (40, 3), (9, 16), (7, 2), (1, 15), (2, 14), (5, 1)]
    ]
    context = [5, 6, 7]
    shared = [(context, [t]) for t in range(20, 26)] + [(context, [20, 21]), (context, [20, 21, 22]), ([5, 6], [7, 20])]
    likeliest = list(context)
    for _ in range(4):
        likeliest.append(int(log_probabilities(model, likeliest)[-1].argmax()))
    return drawn + shared + shared[:2] + [(context, likeliest[3:]), (context, [*likeliest[3:], 9])]


def test_against_numpy(model):
    pairs = pairs_of_all_kinds(model)
    found = score(model, pairs)
    expected = [by_hand(model, *pair) for pair in pairs]
    np.testing.assert_allclose([s.loglikelihood for s in found], [s.loglikelihood for s in expected], rtol=2e-5)
    assert [s.greedy for s in found] == [s.greedy for s in expected]
    assert 1 <= sum(s.greedy for s in found) < len(pairs) / 2


def test_on_all_devices(model):
    pairs = pairs_of_all_kinds(model)
    one, eight = score(model, pairs), score(load(str(trained(*TERNARY))), pairs)
    np.testing.assert_allclose([s.loglikelihood for s in one], [s.loglikelihood for s in eight], rtol=2e-5)


def test_inputs_that_begin_others_share_a_row():
    inputs = [(1, 2), (1, 2, 3), (1, 2), (4,), (1, 3), (1,), (1, 2, 3)]
    assert [(row.tokens, sorted(row.pairs)) for row in _rows(inputs)] == [
        ((1, 2, 3), [0, 1, 2, 5, 6]), ((1, 3), [4]), ((4,), [3])
    ]


def test_few_shapes():
    sizes = {rounded(n) for n in range(1, 2049)}
    assert len(sizes) <= 14 and all(rounded(n) >= n for n in range(1, 2049))
    assert all(rounded(n) < 1.51 * n for n in range(33, 2049))


@pytest.mark.parametrize(
    ("context", "continuation", "head", "tail"),
    [("the whale", " said", "the whale", " said"), ("the whale ", "said", "the whale", " said"),
     ("the \n", "of", "the", " \nof"), ("", "the whale", None, "the whale"), (" ", "the", None, " the")],
)
def test_where_a_text_is_cut(model, context, continuation, head, tail):
    encode = model.tokenizer.encode_batch
    ((left, right),) = encode_pairs(model.tokenizer, [(context, continuation)])
    assert left == (encode([head])[0].tolist() if head else [model.tokenizer.eod])
    assert right == encode([(head or "") + tail])[0].tolist()[len(left) if head else 0 :]


def test_what_cannot_be_scored(model):
    with pytest.raises(UserError, match="the continuation '' of 'the whale' has no token of its own"):
        encode_pairs(model.tokenizer, [("the whale", "")])
    with pytest.raises(UserError, match="a continuation of 17 tokens does not fit into the model's context of 16"):
        score(model, [([1], [2] * 17)])
    with pytest.raises(UserError, match="1 of 2 continuations have no token of their own: .* at a word's boundary"):
        score(model, [([1], [2]), ([1], [])])


# Windows


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3), (16, 8)])
def test_every_token_is_predicted_once(context, stride):
    for n in range(60):
        found = list(spans(n, context, stride))
        assert [t for _, first, stop in found for t in range(first, stop)] == list(range(1, n))
        for start, first, stop in found:
            assert 0 <= start < first < stop <= n and stop - 1 - start <= context
            assert first - start >= min(context - stride, first) and (start == 0 or stop - 1 - start == context)


@pytest.mark.parametrize(("context", "stride"), [(0, 1), (4, 0), (4, 5), (-1, -1)])
def test_windows_out_of_range(context, stride):
    with pytest.raises(UserError, match=f"a context of {context} and a stride of {stride}: a window reads at least 1"):
        list(spans(9, context, stride))


@pytest.mark.parametrize(("context", "stride"), [(None, None), (16, 16), (9, 2)])
def test_texts_against_numpy(model, context, stride):
    documents = [*texts(4, seed=5), "a"]
    found = evaluate_texts(model, documents, context=context, stride=stride)
    sums, counts = [], []
    for text in documents:
        ids = model.tokenizer.encode_batch([text])[0].tolist()
        for start, first, stop in spans(len(ids), context or 16, stride or 8):
            sums.append(-by_hand(model, ids[start:first], ids[first:stop]).loglikelihood)
            counts.append(stop - first)
    assert (found.tokens, found.sequences, found.documents) == (sum(counts), len(sums), 5)
    assert found.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    bits = sum(sums) / math.log(2) / sum(len(text.encode()) for text in documents)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert found.bits_per_byte_error / found.bits_per_byte == pytest.approx(found.loss_error / found.loss)
    assert 0 < found.loss_error < 0.2 * found.loss


def test_more_context_helps_a_text_of_its_own_kind(model):
    """The reason for windows: with a stride of 1 every late token has the whole context before it."""
    documents = texts(6, seed=0)
    losses = [evaluate_texts(model, documents, context=16, stride=stride).loss for stride in (1, 16)]
    assert losses[0] < losses[1]


def test_the_standard_error_of_a_ratio():
    """Against the spread of the ratio over many drawn samples."""
    rng, drawn, estimated = np.random.RandomState(0), [], []
    for _ in range(2000):
        counts = rng.randint(5, 50, 40).astype(float)
        sums = counts * rng.normal(3.0, 0.5, 40)
        drawn.append(sums.sum() / counts.sum())
        estimated.append(ratio_error(sums, counts))
    assert np.mean(estimated) == pytest.approx(np.std(drawn), rel=0.05)
    assert math.isnan(ratio_error(np.array([3.0]), np.array([1.0])))


def test_windows_of_one_document(model):
    ids = list(range(40))
    assert window_pairs(ids, 16, 16) == [
        (ids[:1], ids[1:17]), (ids[16:17], ids[17:33]), (ids[23:33], ids[33:])
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 17}, "--context=17 is not within 1..16, the context of the model"),
        ({"context": 0}, "--context=0 is not within 1..16"),
        ({"context": 8, "stride": 9}, "a context of 8 and a stride of 9: .* advances by 1 to 8"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_texts(model, ["the whale"], **options)


def test_texts_without_text(model, tmp_path):
    with pytest.raises(UserError, match="1 documents without a token to predict"):
        evaluate_texts(model, ["a"])
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "other.jsonl").write_text('{"body": "the whale"}\n')
    run = str(trained(*TERNARY))
    with pytest.raises(UserError, match="blank.txt holds no document, only white space"):
        evaluate_checkpoint(run, None, "validation", None, texts=[str(tmp_path / "blank.txt")])
    with pytest.raises(UserError, match="other.jsonl: line 1: no 'text' among its keys .body."):
        evaluate_checkpoint(run, None, "validation", None, texts=[str(tmp_path / "other.jsonl")])
    with pytest.raises(UserError, match="none.txt: no such file"):
        evaluate_checkpoint(run, None, "validation", None, texts=[str(tmp_path / "none.txt")])


def test_the_table(model, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n<|endoftext|>\n".join(texts(3, seed=8)))
    done = spectra("evaluate", f"--checkpoint={trained(*TERNARY)}", "--texts", str(path), "--context=12", "--stride=4")
    assert done.returncode == 0, done.stderr
    title, head, row = done.stdout.splitlines()
    assert title == "FloatLM run, step 12" and head.split()[-1] == "documents"
    found = evaluate_texts(model, texts(3, seed=8), context=12, stride=4)
    cells = row.replace(",", "").split()
    assert (cells[0], int(cells[1]), int(cells[-1])) == ("words.txt", found.tokens, 3)
    assert float(cells[2]) == pytest.approx(found.loss, abs=2e-4)
    assert float(cells[4]) == pytest.approx(found.loss_error, abs=2e-4)
    both = evaluate_checkpoint(str(trained(*TERNARY)), [str(data())], "validation", 8, texts=[str(path)])
    heads = [line.split()[0] for line in both.splitlines()]
    assert heads == ["FloatLM", "set", "data", "text", "words.txt"] and "split validation" in both.splitlines()[0]
