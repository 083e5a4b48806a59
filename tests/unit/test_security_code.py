"""What no module of ours does: pickle, run text as code, hand a shell a line, trust a model's code.

The engine's own checkpoints are pickles that DeepSpeed loads without a check, so that neither its
`save_checkpoint` nor its `load_checkpoint` is ever called: a run saves safetensors and JSON.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted([*(ROOT / "softprompt_dist").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "os.execl", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "torch.save", "torch.jit.load", "np.save", "numpy.save",
    "subprocess.getoutput", "torch.hub.load",
}  # fmt: skip
METHODS = {"save_checkpoint", "load_checkpoint", "save_16bit_model", "load_module_state_dict"}
"""Of DeepSpeed's engine."""
KEYWORDS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


def faults(text: str) -> Iterator[str]:
    """What `text`, a module, does of it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {m}" for m in modules if m.split(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            yield from _faults_of_call(node)


def _faults_of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS or name.rpartition(".")[2] in METHODS:
        yield name
    for keyword, forbidden in KEYWORDS.items():
        value = given.get(keyword)
        if value is not None and (not isinstance(value, ast.Constant) or value.value == forbidden):
            yield f"{name} with {keyword}={ast.unparse(value)}"
    if name == "torch.load" and "weights_only" not in given:
        yield "torch.load without weights_only"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_runs_nothing_that_it_reads(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from cloudpickle import dumps",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=chosen)",
        "torch.save(x, path)",
        "self._engine.save_checkpoint(folder)",
        "engine.load_checkpoint(folder, tag)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "os.system(line)",
    ],
)
def test_each_of_them_would_be_seen(text: str) -> None:
    assert len(list(faults(text))) == 1


def test_what_is_like_them_is_allowed() -> None:
    text = "torch.load(p, weights_only=True)\nyaml.safe_load(t)\nmodel.eval()\nsubprocess.run([a])"
    assert list(faults(text)) == []
