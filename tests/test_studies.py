"""Every ready study parses, and every override in it is a setting its heads accept; what `protoseg study` takes."""

from pathlib import Path

import pytest
import yaml

from protoseg.cli import main, parse, study_plan
from protoseg.config import UserError
from protoseg.models import build_head
from protoseg.tasks.study_plan import cells_of, variants_of

STUDIES = Path(__file__).parents[1] / "studies"
CLASSES = 11


def read(*words):
    return study_plan(parse(["study", "trial", *words])[1])


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_ready_study_parses_and_every_head_in_it_can_be_built(path, tmp_path):
    plan, recipe = read("--config", str(path))
    cells = cells_of(tmp_path, plan, variants_of(plan), recipe)
    assert len(cells) == len(variants_of(plan)) * len(plan.seeds)
    assert len(plan.seeds) >= 3
    assert plan.baselines
    for cell in cells:
        if cell.seed == plan.seeds[0]:
            build_head(cell.recipe.head, 32, CLASSES)


def test_the_variants_of_a_ready_study_differ():
    for path in STUDIES.glob("*.yaml"):
        plan, recipe = read("--config", str(path))
        recipes = [recipe({**plan.overrides, **settings}) for settings in variants_of(plan).values()]
        assert all(one != other for i, one in enumerate(recipes) for other in recipes[:i]), path


def test_set_adds_to_the_overrides_of_a_study():
    path = STUDIES / "ablation-losses.yaml"
    given = yaml.safe_load(path.read_text()).get("overrides", {})
    plan, recipe = read("--config", str(path), "--set", "data.root=here", "optim.betas=[0.8, 0.9]", "steps=7")
    assert plan.overrides == {**given, "data.root": "here", "optim.betas": [0.8, 0.9], "steps": 7}
    built = recipe(plan.overrides)
    assert (built.data.root, built.optim.betas, built.steps) == ("here", (0.8, 0.9), 7)
    assert built.data.name == "camvid"  # the rest of a section stays


def test_options_override_the_studys_file():
    plan, _ = read("--config", str(STUDIES / "ablation-losses.yaml"), "--seeds", "[5]", "--baselines", "[ce+ppc]")
    assert plan.seeds == (5,)
    assert plan.baselines == ("ce+ppc",)


def test_a_recipe_named_on_the_command_line_is_looked_for_here(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("steps: 11")
    monkeypatch.chdir(tmp_path)
    _, recipe = read("--config", str(STUDIES / "ablation-losses.yaml"), "--recipe", "mine.yaml")
    assert recipe({}).steps == 11


def test_a_study_kept_in_its_folder_is_read_again(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "trial"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("steps: 11")
    (folder / "study.yaml").write_text("recipe: recipe.yaml\nvariants: {a: {}}\nseeds: [4]\n")
    monkeypatch.chdir(tmp_path)
    plan, recipe = read()
    assert plan.seeds == (4,)
    assert recipe({}).steps == 11
    with pytest.raises(SystemExit) as stop:
        main(["study", "trial", "--dry-run"])
    assert stop.value.code == 0
    assert "a/seed4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "holds no study yet"),
        (("--recipe", "none.yaml"), "no such recipe"),
        (("--config", str(STUDIES / "ablation-losses.yaml"), "--set", "steps"), "expected NAME=VALUE"),
        (("--config", str(STUDIES / "ablation-losses.yaml"), "--set", "steps=*a"), "not YAML"),
    ],
)
def test_what_cannot_be_a_study_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read(*words)


def test_a_setting_that_does_not_exist_is_named(tmp_path):
    _, recipe = read("--config", str(STUDIES / "ablation-losses.yaml"))
    with pytest.raises(UserError, match="'head' does not accept option 'colour'"):
        recipe({"head.colour": 3})
    with pytest.raises(UserError, match="num_prototypes"):
        recipe({"head.num_prototypes": "many"})


def test_a_name_is_no_path():
    with pytest.raises(UserError, match="no name of a study"):
        parse(["study", "../trial"])
