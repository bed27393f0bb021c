"""`spectra analyze` and `spectra report` on a tiny suite, and the report in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from helpers import ROOT, TERNARY, prepare_set, spectra, trained
from matplotlib.image import imread

from spectra_jax.analysis.plots import FAMILIES
from spectra_jax.analysis.sections import SECTIONS
from spectra_jax.analyze import analyze
from spectra_jax.cli import run
from spectra_jax.errors import UserError
from spectra_jax.report import report


@pytest.mark.parametrize(
    ("name", "tables", "figures"),
    [("scaling", {"size_within"}, {"laws"}), ("bits", {"bits"}, {"benchmark"}),
     ("deployment", {"memory", "fits", "claims"}, {"memory", "speedup"}),
     ("hardware", {"accelerators", "trends"}, {"hardware"}),
     ("published", {"benchmarks", "ablation", "validation"}, {"benchmark"})],
)
def test_without_runs_the_published_numbers(tmp_path, name, tables, figures):
    text = analyze(name, [], tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{table}.csv" for table in tables} | {f"{figure}.png" for figure in figures} <= written
    for table in tables:
        assert len(pd.read_csv(tmp_path / "out" / f"{table}.csv")) >= 3 and f"\n{table}\n" in text
    assert all(name in text.splitlines()[-1] for name in written)


def test_a_suite_of_ones_own(suite, tmp_path):
    text = analyze("suite", [str(suite)], tmp_path)
    gaps = pd.read_csv(tmp_path / "gaps.csv")
    assert list(gaps["D"]) == [16, 32, 48, 64] and set(gaps["pair"]) == {"TriLM - FloatLM"}
    assert list(pd.read_csv(tmp_path / "arms.csv")["pair"]) == ["TriLM neither - TriLM"]
    assert list(pd.read_csv(tmp_path / "quantized.csv")["D"]) == [16, 32, 48, 64]
    laws = pd.read_csv(tmp_path / "laws.csv")
    assert set(laws["law"]) == {"size", "power", "bits", "block_bits"} and {"FloatLM", "TriLM"} <= set(laws["group"])
    assert {"gaps.png", "quantized.png", "bits_versus_loss.png", "law_of_size.png", "law_of_bits.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert "No " not in text, "nothing was left out"
    missing = analyze("suite", [str(suite / name) for name in ("trilm-16", "floatlm-16")])
    assert "No arms: no two runs of TriLM only decay removed" in missing and "No laws: " in missing


def test_scaling_of_ones_own(suite, tmp_path):
    text = analyze("scaling", [str(suite)], options={"form": "power", "x": "linear", "shared": ["alpha"]})
    assert text.startswith("Scaling law 'power': loss against linear") and "size_within" in text
    assert "best" in analyze("bits", [str(suite)])
    with pytest.raises(UserError, match=r"2 models \(FloatLM, TriLM\) are too few for the 6 constants"):
        analyze("scaling", [str(suite / "floatlm-16"), str(suite / "trilm-16")])
    with pytest.raises(UserError, match="'loss' is missing for trilm-16@2; finish or evaluate these models"):
        analyze("scaling", [f"{suite}/trilm-16@2"])
    other = trained(*TERNARY, "data.T=8", f"data.sets={prepare_set(tmp_path / 'other', context=8)}")
    with pytest.raises(UserError, match=r"models of different data are on no common scale here \(.*floatlm-16"):
        analyze("scaling", [str(other), str(suite)], options={"form": "power"})


def test_weights_dynamics_and_training(suite, tmp_path):
    text = analyze("weights", [str(suite)], tmp_path / "weights")
    assert "matrices of trilm-64" in text
    assert len(pd.read_csv(tmp_path / "weights" / "entropies.csv")) == 12, "the arm is left out"
    assert "step 3: peak lowered; step 4: decay removed" in analyze(
        "dynamics", [str(suite / "trilm-16")], tmp_path / "dynamics", {"batches": 1}
    )
    assert (tmp_path / "dynamics" / "dynamics.png").is_file()
    assert "goodput" in analyze("training", [str(suite / "trilm-16"), str(suite / "quantlm-16")])
    with pytest.raises(UserError, match="dynamics are of one run; 13 are named"):
        analyze("dynamics", [str(suite)])
    with pytest.raises(UserError, match="quantlm-16 is a QuantLM that was made and not trained: .*; name the run"):
        analyze("dynamics", [str(suite / "quantlm-16")])
    with pytest.raises(UserError, match="none of the runs was trained here"):
        analyze("training", [str(suite / "quantlm-16")])
    for name in ("weights", "dynamics", "training", "suite"):
        with pytest.raises(UserError, match="no runs are named"):
            analyze(name, [])


def test_the_command_line(suite, tmp_path, capsys):
    run(["analyze", "deployment", f"--config={ROOT}/configs/trilm.py:99m", "--device=H100", "--context=2048",
         "--config.model.L=2"])
    printed = capsys.readouterr().out
    assert "trilm-99m" in printed and "H100 SXM" in printed and "claims" not in printed
    run(["report", str(suite / "trilm-16"), f"--out={tmp_path}/one.html", "--title=One <run>"])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/one.html: 1 runs")
    assert "<title>One &lt;run&gt;</title>" in (tmp_path / "one.html").read_text()
    for arguments, message in (
        (["analyze", "scalling"], "analysis='scalling' is not one of .*; did you mean scaling"),
        (["analyze", "hardware", "--form=power"], "--form is not an option of the analysis 'hardware'"),
        (["analyze", "deployment", "--form=power"], "'deployment'; it has --config, --device, --context, --sequences"),
        (["analyze", "deployment", "--device=H1000"], "unknown device 'H1000'"),
        (["analyze", "suite", "--config.model.L=2"], "--config.model.L=2 changes a config; name one with --config="),
        (["analyze", "suite", str(tmp_path / "nothing")], "holds no run and no rows"),
        (["analyze", "published", "--task=boolk"], "nothing is published of boolk avg6"),
        (["report", str(suite), "--out=report.pdf"], "--out=report.pdf: a report is one file, such as report.html"),
        (["report"], "the following arguments are required: WORKDIR"),
    ):
        with pytest.raises(UserError, match=message):
            run(arguments)


def test_nothing_half_written(suite, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot write to .*file: .*; choose another --out"):
        analyze("hardware", [], tmp_path / "file")
    with pytest.raises(UserError, match="cannot write .*file/x.html: .*; choose another --out"):
        report([str(suite / "trilm-16")], tmp_path / "file" / "x.html")
    assert (tmp_path / "file").read_text() == "precious"


# The report


@pytest.fixture(scope="module")
def page(suite, tmp_path_factory) -> Path:
    """The report on the whole suite."""
    out = tmp_path_factory.mktemp("report") / "suite.html"
    assert report([str(suite)], out).startswith(f"{out}: 13 runs, ")
    return out


class Reader(HTMLParser):
    """What a page would fetch, its headings, images and tables."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.headings, self.images, self.tables, self.scripts, self._heading = [], [], [], 0, 0, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.fetched += [found[key] for key in ("src", "href") if key in found]
        self.tables += tag == "table"
        self.scripts += tag == "script"
        self._heading = tag in ("h1", "h2")
        if tag == "img":
            self.images.append(found["alt"])

    def handle_data(self, text):
        if self._heading:
            self.headings.append(text)
            self._heading = False


def test_it_is_self_contained_and_says_everything(page, suite):
    text = page.read_text()
    found = Reader(text)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in found.fetched) and not found.scripts
    assert found.headings == ["Runs: runs", "Runs", "Training", "Families compared", "Weights",
                              f"Dynamics of {suite / 'trilm-16'}", "Configs"]
    drawn = {"loss", "gaps", "quantized", "bits versus loss", "law of size", "entropies", "dynamics"}
    assert drawn <= set(found.images)
    assert found.tables >= 10
    for row in suite.iterdir():
        if row.is_dir():
            assert f"<td>{row.name}</td>" in text
    assert "All of the same training data and tokenizer, by one commit." in text
    assert "&quot;family&quot;: &quot;FloatLM&quot;" in text and "model.D: 16 -&gt; 64" in text
    assert "Left out" not in text


def test_what_runs_do_not_suffice_for_is_said(suite, tmp_path):
    report([str(suite / "quantlm-16"), str(trained(*TERNARY))], tmp_path / "two.html")
    text = (tmp_path / "two.html").read_text()
    assert "No gaps: no two runs of TriLM and FloatLM" in text and "No laws: " in text
    report([str(suite / "quantlm-16")], tmp_path / "one.html")
    assert "Left out: none of the runs was trained here" in (tmp_path / "one.html").read_text()


def test_in_a_browser(page, tmp_path):
    """Headless Chromium draws the whole page: text, tables and figures in the families' colours."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,5000", f"--screenshot={picture}",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert picture.is_file(), done.stderr
    image = (imread(picture)[..., :3] * 255).round().astype(int)
    assert image.shape[:2] == (5000, 1200)
    for family in ("FloatLM", "TriLM", "QuantLM"):
        color = [int(FAMILIES[family][0][k : k + 2], 16) for k in (1, 3, 5)]
        assert (abs(image - color).max(axis=-1) < 12).sum() > 300, f"{family} is not drawn in its colour"
    ink = (image.min(axis=-1) < 200).mean(axis=1)
    assert (ink.reshape(-1, 500).max(axis=1) > 0.01).sum() >= 8, "empty stretches"


def test_every_analysis_is_in_the_help():
    done = spectra("analyze", "--help")
    assert done.returncode == 0
    assert all(re.search(rf"\b{name} ", done.stdout) for name in SECTIONS)
