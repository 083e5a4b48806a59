import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from softprompt_dist import cli
from softprompt_dist.recipe import resolve_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").glob("*.md"),
    REPOSITORY / "ds_configs/README.md",
]
SOURCED = [REPOSITORY / "slurm" / name for name in ("env.sh", "until_done.sh")]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(text=README):
    """Every command of a page's shell blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


def test_the_recipe_reference_is_that_of_the_code():
    path = REPOSITORY / "docs" / "recipe_reference.py"
    spec = importlib.util.spec_from_file_location("recipe_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = path.with_name("recipes.md").read_text(encoding="utf-8")
    assert written == module.reference(), "run: python docs/recipe_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_leads_nowhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_readme_names_every_verb_and_no_other():
    named = set(re.findall(r"`softprompt ([a-z]+)`", README))
    assert named == set(cli.VERBS)


def commands_of_the_docs():
    """Those that are ours, each once."""
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    ours = [c for page in pages for c in commands(page) if c[0] == "softprompt" or "sbatch" in c]
    return [list(command) for command in dict.fromkeys(map(tuple, ours))]


@pytest.mark.parametrize("command", commands_of_the_docs(), ids=" ".join)
def test_a_command_of_the_docs_has_options_that_exist(command):
    if command[0] == "softprompt":
        importlib.import_module(cli.module_of(command[1])).build_parser().parse_args(command[2:])
    else:
        check_sbatch(command)


def check_sbatch(command):
    """The script is there, and tells of the variables that it is given."""
    variables = [word.partition("=")[0].split("$(")[-1] for word in command if "=" in word]
    variables = [name for name in variables if name.isupper()]
    script = REPOSITORY / next(word for word in command if word.endswith(".sh"))
    told = "".join(file.read_text(encoding="utf-8") for file in (script, *SOURCED))
    # `# TASKS, SEEDS   what they mean`
    headings = re.findall(r"^# +((?:[A-Z_]+(?:, )?)+) ", told, flags=re.MULTILINE)
    known = {name for heading in headings for name in heading.split(", ")}
    assert [name for name in variables if name not in known] == []


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_one_that_exists(command):
    """Options are known to the verb, recipes and files are there, make targets are in the
    Makefile."""
    if command[0] == "make":
        makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{command[1]}:", makefile, flags=re.MULTILINE)
        return
    if command[0] == "pip":
        assert command[1:] == ["install", "."]
        return
    if "sbatch" in command:
        check_sbatch(command)
        return
    if "deepspeed" in command:
        module = command[command.index("-m") + 1]
        verb, arguments = module.rpartition(".")[2], command[command.index(module) + 1 :]
    else:
        assert command[0] == "softprompt"
        verb, arguments = command[1], command[2:]
    parser = importlib.import_module(cli.module_of(verb)).build_parser()
    options = parser.parse_args(arguments)
    if getattr(options, "recipe", None):
        assert resolve_recipe(options.recipe).is_file()
    if getattr(options, "deepspeed_config", None):
        written = {each[each.index("--write") + 1] for each in commands() if "--write" in each}
        config = options.deepspeed_config
        assert config in written or (REPOSITORY / config).is_file()
