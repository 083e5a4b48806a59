"""Installed as a wheel and as an editable: `deepspeed -m` works, and nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PRINT_ARGUMENTS = "import sys\nprint(*sys.argv[1:])\nprint('softprompt_dist' in sys.modules)\n"


class Environment:
    """A throw-away virtual environment, driven by the pip of the one the tests run in."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python3*/site-packages")

    def pip(self, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--quiet"]
        run([*pip, *arguments])

    def program(self, name: str) -> Path:
        path = self.python.with_name(name)
        path.write_text(f"#!{self.python}\n{PRINT_ARGUMENTS}")
        path.chmod(0o755)
        return path

    def files(self) -> set[str]:
        places = (self.site_packages, self.python.parent)
        return {str(p) for place in places for p in place.rglob("*") if p.suffix != ".pyc"}


def run(command: list[str | Path]) -> str:
    # From the repository's folder the package could be imported without being installed.
    environ = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COVERAGE_PROCESS_START")
    }
    done = subprocess.run(
        command, cwd="/", env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["wheel", "editable"])
def distribution(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    build = f"import hatchling.build as b; b.build_{request.param}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=REPOSITORY, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_deepspeed_m_works_until_uninstalled(distribution: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    launcher, other = environment.program("deepspeed"), environment.program("other")
    before = environment.files()

    environment.pip("install", "--no-deps", "--no-index", distribution)
    typed = ["--num_gpus", "2", "-m", "softprompt_dist.train", "-m", "theirs"]
    assert (
        run([launcher, *typed]).split("\n")[0]
        == "--num_gpus 2 --module softprompt_dist.train -m theirs"
    )
    assert run([other, *typed]).split() == [*typed, "False"]
    assert environment.python.with_name("softprompt").exists()

    environment.pip("uninstall", "--yes", "softprompt-dist")
    assert environment.files() == before
    assert run([launcher, *typed]).split() == [*typed, "False"]


def test_wheel_carries_recipes_and_assets(distribution: Path) -> None:
    names = zipfile.ZipFile(distribution).namelist()
    if "softprompt_dist/__init__.py" not in names:
        pytest.skip("an editable install reads them from the checkout")
    for folder in ("recipes", "assets", "data/catalogue"):
        wanted = {
            str(p.relative_to(REPOSITORY))
            for p in (REPOSITORY / "softprompt_dist" / folder).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts
        }
        assert wanted <= set(names)
    scripts = {
        f"softprompt_dist/batch_scripts/{p.name}" for p in (REPOSITORY / "slurm").glob("*.sh")
    }
    assert scripts <= set(names)


def test_an_install_leaves_the_user_s_torch_alone(distribution: Path) -> None:
    with zipfile.ZipFile(distribution) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith("/METADATA")]
        metadata = wheel.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
    assert required == ["Requires-Dist: torch>=2.10"]
