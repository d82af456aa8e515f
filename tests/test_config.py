"""A config names what is wrong with it, and what would be right."""

import re
from pathlib import Path

import pytest
import yaml

from clinkd.config import RunConfig, check, dump, load
from clinkd.errors import ConfigError
from clinkd.recipes import recipe, recipes, summary

CONFIGS = Path(__file__).parent.parent / "configs"


def test_unknown_key_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown key 'distill.kd_wieght'; did you mean 'kd_weight'"
    ):
        check({"distill": {"kd_wieght": 0.5}})


def test_unknown_section_lists_what_is_known():
    with pytest.raises(ConfigError, match=r"unknown key 'teachr'; did you mean 'teacher'.*distill"):
        check({"teachr": {}})


def test_wrong_value_names_key_value_and_nearest():
    with pytest.raises(
        ConfigError, match=r"model.positions.preset:.*did you mean 'paper'\?, got 'papr'"
    ):
        check({"model": {"positions": {"preset": "papr"}}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"seed": -1}, "seed: .*greater than or equal to 0, got -1"),
        ({"distill": {"temperature": 0}}, "distill.temperature: .*greater than 0, got 0"),
        ({"generate": {"num_beams": 2, "num_samples": 3}}, "num_samples must be at most num_beams"),
        ({"data": {"teacher_fraction": 1.5}}, "data.teacher_fraction: .*got 1.5"),
    ],
)
def test_out_of_range(tree, message):
    with pytest.raises(ConfigError, match=message):
        check(tree)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        check({"sed": 1, "distill": {"temperature": -1}})
    assert "'sed'" in str(error.value)
    assert "distill.temperature" in str(error.value)


def test_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("distill: {epochs: 3}\n")
    config = load(
        path, ["distill.kd_weight=0.25", "model.positions.pos_scale=[1, 1]", "output=x=y"]
    )
    assert config.distill.epochs == 3
    assert config.distill.kd_weight == 0.25
    assert config.model.positions.pos_scale == (1.0, 1.0)
    assert config.output == "x=y"


@pytest.mark.parametrize(
    ("override", "message"),
    [("seed", "must be written key=value"), ("seed.x=1", "is a value, not a section")],
)
def test_bad_overrides(tmp_path, override, message):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=message):
        load(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "must hold keys and values"),
        ("!!python/name:os.system ''", "not valid YAML"),
        ("output: {{ folder }}", "not valid YAML"),
        ("seed: 1\nteacher: {}\nseed: 2\n", "key 'seed' stands here twice"),
        ("teacher:\n  epochs: 1\n  epochs: 2\n", "key 'epochs' stands here twice"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_file_in_another_encoding(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("output: Köln".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not UTF-8 text: .* at byte 9"):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.yaml")


def test_dump_reads_back():
    config = check({"seed": 3, "model": {"positions": {"preset": "gap2"}}})
    assert RunConfig.model_validate(yaml.safe_load(dump(config))) == config


def test_texts_in_overrides_stand_as_they_are_written(tmp_path):
    """YAML would end at the #, and take 2025 for a number."""
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    for text in ("run #2", "2025", "a: b", "[x]", "~user/of/none", "a: ["):
        assert load(path, [f"output={text}"]).output == text
    assert load(path, ["output='run #2'"]).output == "run #2"
    with pytest.raises(ConfigError, match=r"log.wandb: .*valid string, got False"):
        load(path, ["log.wandb=false"])
    assert load(path, ["data.root=images #1"]).data.root == "images #1"
    assert load(path, ["data.root=null"]).data.root is None
    assert load(path, ["seed=0x10"]).seed == 16


def test_a_heading_with_nothing_under_it_says_nothing(tmp_path):
    """Its keys are comments, maybe."""
    path = tmp_path / "run.yaml"
    path.write_text("teacher:\n  # epochs: 3\nmodel:\n  positions:\ncorrect:\n  corrector:\n")
    assert load(path) == check({})
    assert load(path, ["teacher.epochs=3"]).teacher.epochs == 3


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    models = {"student": "~/qwen", "teacher": "~/large"}
    data = {"train": "~/a.jsonl", "root": "~/images"}
    config = check({"output": "~/run", "data": data, "model": models})
    model = config.model
    assert check({"generate": {"scorer": "~/clip"}}).generate.scorer == str(tmp_path / "clip")
    places = (config.output, config.data.train, config.data.root, model.student, model.teacher)
    names = ("run", "a.jsonl", "images", "qwen", "large")
    assert places == tuple(str(tmp_path / name) for name in names)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"teacher": {"epochs": float("inf")}}, "teacher.epochs: .*finite"),
        (
            {"model": {"positions": {"pos_scale": [-1, 0]}}},
            "pos_scale: must be two numbers",
        ),
        ({"model": {"min_pixels": 100_000, "max_pixels": 3136}}, "min_pixels must be at most max"),
        ({"model": {"demo": {"vision_width": 40}}}, "vision_width: must be a multiple of 32"),
        ({"model": {"adapter": {"targets": "((("}}}, "targets: must be a regular expression"),
        ({"model": {"student": "some/model", "teacher": "demo"}}, "teacher 'demo' needs student"),
    ],
)
def test_what_would_fail_hours_later(tree, message):
    with pytest.raises(ConfigError, match=message):
        check(tree)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_sound_and_begin_with_their_command(path):
    load(path)
    lines = path.read_text().splitlines()
    assert summary(path).endswith((".", "?"))
    assert any("clinkd" in line for line in lines[1:5])
    assert recipe(path.stem).name == path.name


def test_paper_settings():
    for name in ("qwen2vl-2b-a100x6", "qwen2vl-7b-a100x6"):
        config = load(recipe(name))
        assert config.distill.kd_weight == 0.5
        assert config.distill.epochs == 2
        assert config.correct.rounds * config.correct.epochs == 2
        assert config.distill.learning_rate == 2e-5
        assert (config.generate.num_beams, config.generate.num_samples) == (3, 3)
        assert config.data.teacher_fraction == 0.111


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        recipe("deno")
    assert {"demo", "demo-quick", "published-code"} <= set(recipes())


def test_the_page_of_all_keys_has_all_keys_and_their_defaults():
    page = (CONFIGS.parent / "docs" / "config.md").read_text(encoding="utf-8")
    told = {}
    for part in page.split("\n## ")[1:]:
        heading, *lines = part.splitlines()
        section = heading.strip("`") if heading.startswith("`") else ""
        for line in lines:
            if line.startswith("| `"):
                key, default, *_ = (cell.strip(" `") for cell in re.split(r"(?<!\\)\|", line)[1:])
                told[f"{section}.{key}".lstrip(".")] = yaml.safe_load(default.replace("\\|", "|"))
    known = yaml.safe_load(dump(RunConfig()))
    for section in ("distill", "correct"):  # which have the keys of `teacher`, and say so
        for key, value in known["teacher"].items():
            if f"{section}.{key}" not in told:
                told[f"{section}.{key}"] = value

    def leaves(tree, before=""):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{before}{key}.")
            else:
                yield f"{before}{key}", value

    assert told.keys() == dict(leaves(known)).keys()
    for key, value in leaves(known):
        given = float(told[key]) if isinstance(value, float) else told[key]
        assert (key, given) == (key, value)
