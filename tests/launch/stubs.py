"""Programs that are not there: stubs that write their arguments down, and an environment that holds nothing else."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

LAUNCH = ROOT / "launch"
CONFIG = "--config=configs/trilm.py:3.9b"
# What goes through two shells and ssh has to arrive as it was.
TRAIN = (CONFIG, "--config.name=it's a \"name\"", "--config.data.sets=$HOME/*,b;c", "--config.seed=3")
STUB = f"""#!{sys.executable} -IS
import json, sys, pathlib
me = pathlib.Path(sys.argv[0])
with open(me.parent / "calls.jsonl", "a") as file:
    print(json.dumps([me.name, *sys.argv[1:]]), file=file)
answers = me.parent / (me.name + ".json")
left = json.loads(answers.read_text()) if answers.exists() else []
said, status, made = left[0] if left else ["", 0, None]
answers.write_text(json.dumps(left[1:]))
print(said)
if made:
    pathlib.Path(made).mkdir(parents=True)
sys.exit(status)
"""


class Machine:
    """A home folder, and a PATH with stubs and a few named real programs."""

    def __init__(self, folder: Path, real: tuple[str, ...] = ("dirname",)):
        self.home, self.bin = folder / "home", folder / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        for name in real:
            (self.bin / name).symlink_to(shutil.which(name))
        self.env = {"PATH": str(self.bin), "HOME": str(self.home), "SPECTRA_WAIT_SECONDS": "0"}

    def stub(self, *names: str, answers: list[tuple[str, int, str | None]] | None = None, folder: Path | None = None):
        """Puts programs on the PATH; call by call they print, exit with and make a folder of these answers."""
        for name in names:
            path = (folder or self.bin) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STUB)
            path.chmod(0o755)
            path.with_name(name + ".json").write_text(json.dumps(answers or []))

    def calls(self, folder: Path | None = None) -> list[list[str]]:
        """The command lines of the stubs, in their order."""
        path = (folder or self.bin) / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def launch(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """Runs a script of launch/ to its end; settings are variables of its environment."""
        return subprocess.run(
            [shutil.which("bash"), LAUNCH / script, *arguments], env=self.env | settings, cwd=self.home,
            capture_output=True, text=True, timeout=120, check=False,
        )

    def shell(self, text: str, shell: str = "bash", **settings: str) -> subprocess.CompletedProcess:
        """Runs a line as a remote shell would, in the home folder."""
        return subprocess.run(
            [shutil.which(shell), "-c", text], env=self.env | settings, cwd=self.home, capture_output=True, text=True,
            timeout=120, check=False,
        )


def words(printed: str) -> list[list[str]]:
    """The commands that a dry run printed."""
    return [shlex.split(line) for line in printed.splitlines()]
