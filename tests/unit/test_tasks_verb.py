"""`softprompt tasks`: what it prints, from the samples and from the user's rows."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest

from softprompt_dist.data.catalogue.registry import CATALOGUE
from softprompt_dist.errors import ConfigError, DataError
from softprompt_dist.metrics.registry import METRICS
from softprompt_dist.tasks import main

ROWS = [{"question": f"q{n}", "passage": "a\nb ", "label": n == 1, "idx": n} for n in range(3)]


def lines(capsys, *arguments):
    main(arguments)
    return capsys.readouterr().out.splitlines()


def write_rows(path, rows=ROWS):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_list_has_a_line_for_every_task(capsys):
    said = lines(capsys, "list")
    rows = {line.split()[0]: line for line in said if line.startswith("  ")}
    assert [*rows] == [*CATALOGUE]
    assert rows["cb"].split("  ")[1:] != []
    for part in ("entailment, contradiction, neutral", "mean_3class_f1, accuracy"):
        assert part in rows["cb"]
    assert rows["cb"].endswith("aps/super_glue cb")
    assert "free text" in rows["squad"]
    assert "0.0, 0.2 ... 5.0" in rows["stsb"]
    assert said[0] == "SuperGLUE"


@pytest.mark.parametrize("name", CATALOGUE)
def test_show_says_that_its_rows_are_samples(capsys, name):
    said = lines(capsys, "show", name)
    assert said[0].startswith(f"{name}: ")
    assert any("sample rows of this package" in line for line in said)
    assert len([line for line in said if "  input   " in line]) == 3


def test_show_gives_the_exact_text(capsys):
    said = lines(capsys, "show", "wsc", "--examples", "1", "--prefixed")
    assert (
        said[-3] == '  1  input   "wsc: The cello did not fit into the taxi because *it* was too '
        'wide ."'
    )
    assert said[-2:] == ['     target  "The cello"', "     label   1"]
    assert '"The cello did' in "\n".join(lines(capsys, "show", "wsc"))


def test_show_of_the_training_split_is_what_is_trained_on(capsys):
    assert not any("label   0" in line for line in lines(capsys, "show", "wsc", "--split", "train"))
    assert any("label   0" in line for line in lines(capsys, "show", "wsc"))


def test_show_reads_a_file(capsys, tmp_path):
    said = lines(capsys, "show", "boolq", "--data", str(write_rows(tmp_path / "mine.jsonl")))
    assert "3 of the 3 examples of mine.jsonl:" in said
    assert r"""  1  input   "passage: a\nb  question: q""" in "\n".join(said)
    assert not any("sample rows" in line for line in said)


def test_show_reads_a_zip_and_its_splits(capsys, tmp_path):
    path = tmp_path / "BoolQ.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in {"train": 3, "val": 2}.items():
            archive.writestr(f"BoolQ/{split}.jsonl", "\n".join(map(json.dumps, ROWS[:count])))
    assert any(
        "2 of the 2 examples" in x for x in lines(capsys, "show", "boolq", "--data", str(path))
    )


def test_a_folder_is_for_superglue_only(tmp_path):
    with pytest.raises(DataError, match="only SuperGLUE has zips and folders, and mrpc is none"):
        main(["show", "mrpc", "--data", str(tmp_path)])


def test_a_bad_row_is_named_by_its_line(tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", [*ROWS, {"passage": "p", "label": 0}])
    with pytest.raises(DataError, match=r"(?i)line 4 of mine\.jsonl .* no field 'question'"):
        main(["show", "boolq", "--data", str(path)])


def test_metrics_has_a_line_for_every_metric(capsys):
    assert [line.split()[0] for line in lines(capsys, "metrics")] == [*METRICS]


def test_what_is_mistyped_is_a_message():
    with pytest.raises(DataError, match="no task 'bolq'. Did you mean 'boolq'"):
        main(["show", "bolq"])
    with pytest.raises(ConfigError, match="invalid choice: 'shwo'"):
        main(["shwo"])
    with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
        main(["show", "boolq", "--examples", "0"])
    with pytest.raises(ConfigError, match="ACTION"):
        main([])


@pytest.mark.parametrize("arguments", [["list"], ["show", "boolq"], ["metrics"]])
def test_it_answers_without_torch(arguments):
    code = (
        f"import sys\nfrom softprompt_dist.tasks import main\nmain({arguments})\n"
        "print({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
