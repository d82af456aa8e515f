"""The processor of a checkpoint sees images as the run's config says, whatever its file says."""

import json
import re
from functools import partial

import pytest
from PIL import Image

from clinkd.config import check
from clinkd.errors import SetupError
from clinkd.models.demo import build_processor
from clinkd.pipeline import steps


@pytest.mark.parametrize(
    "names",
    [
        {"min_pixels": 3136, "max_pixels": 12_845_056},  # as Qwen2-VL's and Qwen2.5-VL's files
        {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}},
        {"size": {"shortest_edge": 3136, "longest_edge": 9}, "max_pixels": 12_845_056},
        {},
    ],
    ids=str,
)
def test_the_config_decides(tmp_path, names):
    build_processor(["What?"], 300, 3136, 12_845_056).save_pretrained(tmp_path)
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = tmp_path / file
        tree = json.loads(path.read_text()) if path.exists() else {"image_processor": {}}
        images = tree.get("image_processor", tree)
        for key in ("size", "min_pixels", "max_pixels"):
            images.pop(key, None)
        images |= {"image_processor_type": "Qwen2VLImageProcessor", **names}
        path.write_text(json.dumps(tree))
    config = check({"model": {"min_pixels": 3136, "max_pixels": 100_352}})
    for _ in range(2):  # and as the run saves it beside a trained student
        processor = steps.load_processor(config, str(tmp_path))
        images = processor.image_processor
        assert images.get_number_of_image_patches(1000, 1800, {}) // 4 <= 128
        assert (images.size["shortest_edge"], images.size["longest_edge"]) == (3136, 100_352)
        processor.save_pretrained(tmp_path)


def test_sizes_stay_with_the_images(tmp_path, recwarn):
    """The tokenizer kept them too: each call warned, and files of a student had stale ones."""
    build_processor(["What?"], 300, 3136, 50_176).save_pretrained(tmp_path)
    processor = steps.load_processor(check({"model": {"max_pixels": 6272}}), str(tmp_path))
    processor(text=[processor.image_token], images=[Image.new("RGB", (90, 40))])
    assert [str(w.message) for w in recwarn if "pixels" in str(w.message)] == []
    processor.save_pretrained(tmp_path / "student")
    kept = json.loads((tmp_path / "student" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert {"size", "min_pixels", "max_pixels"}.isdisjoint(kept)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("read", [steps.read_config, partial(steps.load_processor, check({}))])
def test_a_wrong_model_folder_is_named_with_the_right_ones(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("run/student/base", "run/student/distilled", "run/teacher"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    students = "run/student/base, run/student/distilled"
    for name, why in (
        ("run/student/corrected", f"there is no such folder; models are in {students}"),
        ("run/nowhere", "there is no such folder; models are in run/teacher"),
        ("other/student/base", "there is no such folder"),
        ("run/student", f"the folder holds no model; models are in {students}"),
        ("run", f"the folder holds no model; models are in run/teacher, {students}"),
    ):
        with pytest.raises(SetupError, match=re.escape(f"{name}: no ") + f".* \\({why}\\); give"):
            read(name)
    with pytest.raises(SetupError, match=r"couldn't connect"):  # the hub is asked
        read("nobody/nothing")


def test_another_size_than_asked_for_is_an_error(tmp_path, monkeypatch):
    build_processor(["What?"], 300, 3136, 50_176).save_pretrained(tmp_path)
    real = steps.AutoProcessor.from_pretrained
    monkeypatch.setattr(steps.AutoProcessor, "from_pretrained", lambda path, **_: real(path))
    config = check({"model": {"min_pixels": 3136, "max_pixels": 6272}})
    with pytest.raises(SetupError, match=r"not the run's model.min_pixels 3136 and model.max_pix"):
        steps.load_processor(config, str(tmp_path))
