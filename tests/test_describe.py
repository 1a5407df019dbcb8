"""--describe: every field with the comment of configs/base.py, and what is set."""

from pathlib import Path

from configs import base
from run_lib import config_files, describe
from run_lib.folder import flatten

CONFIG = str(Path(__file__).resolve().parents[1] / "configs/digits/vp.py")
SECTIONS = ["data", "model", "training", "optim", "deq", "classifier", "sampling", "eval"]


def field(name: str) -> describe.Field:
    return next(field for field in describe.fields() if field.dotted == name)


def test_every_field_has_a_meaning_and_its_default() -> None:
    fields = describe.fields()
    defaults = dict(flatten(base.get_config().to_dict()))
    assert {f.dotted: f.default for f in fields} == defaults
    assert len(fields) == len(defaults)
    assert [f.dotted for f in fields if not f.meaning] == []


def test_meanings_stand_beside_above_and_under_headings() -> None:
    assert field("data.levels").meaning == "number of grey levels"
    assert field("training.time_law").meaning.startswith("law of the times by name")
    assert field("training.time_law").meaning.endswith("'': those fields decide")
    assert field("training.fp_every").heading.startswith("Of the Fokker-Planck regulariser")
    assert field("model.beta_min").heading == "Of the SDE:"
    assert field("model.name").heading == field("optim.lr").heading == ""
    assert field("seed").meaning.startswith("the seed of all that is drawn")


def test_fields_follow_configs_base() -> None:
    assert list(dict.fromkeys(f.section for f in describe.fields())) == ["", *SECTIONS]
    assert describe.fields()[1].name == "dataset"
    assert describe.fields()[-1].name == "curve_examples"


def test_what_is_set_is_marked_with_its_default() -> None:
    config = config_files.load(CONFIG)
    config_files.change(config, "training.batch_size", "32")
    config_files.change(config, "model.dtype", "bfloat16")
    text = describe.table(config, CONFIG, ["training.batch_size", "model.dtype"])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line.isidentifier()] == SECTIONS
    assert text.count("\n  > ") == 2
    before, after = dict(flatten(base.get_config().to_dict())), dict(flatten(config.to_dict()))
    changed = [name for name in before if before[name] != after[name]]
    assert text.count("\n  * ") == len(changed) - 2
    words = " ".join(text.split())
    assert "> batch_size 32 over all devices and hosts (default 128)" in words
    assert "* levels 17 number of grey levels (default 256)" in words
    assert "predictor 'euler_maruyama' for pc: euler_maruyama |" in words


def test_long_values_stand_on_lines_of_their_own() -> None:
    config = config_files.load(CONFIG)
    path = "x" * 200
    config_files.change(config, "data.path", path)
    lines = describe.table(config, CONFIG, ["data.path"]).splitlines()
    number = next(i for i, line in enumerate(lines) if path in line)
    assert lines[number].split() == [">", "path", repr(path)]
    assert lines[number + 1].startswith(" " * 48 + "an .npz, .npy")


def test_the_page_of_fields_is_made_from_the_config() -> None:
    page = Path(CONFIG).parents[2] / "docs" / "reference" / "fields.md"
    told = "make it anew: python -m run_lib.describe"
    assert page.read_text(encoding="utf-8") == describe.markdown(), told
