"""Config: what a file and the command line may say, and one line for what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sait.train.config import Config, TrainingError, from_dict, parse_change, read_config
from sait.train.trainer import create_student


def test_changes_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-3\nkeep: [0.3, 0.7]\nmodel_kwargs: {depth: 8}\nema: null\n")
    config = read_config(path, {"epochs": 3})
    kwargs = {"img_size": 64, "patch_size": 8, "depth": 8}
    assert (config.lr, config.epochs, config.model_kwargs, config.ema) == (0.001, 3, kwargs, None)
    assert config.density == ("keep", [0.3, 0.7])
    assert read_config(path, {"mass": 0.9}).density == ("mass", [0.9, 0.9])
    assert read_config(None, {}).density == ("keep", [0.45, 0.45])


def test_the_defaults_fit_each_other():
    """`sait train` without arguments: the model takes the images of the data."""
    kwargs, model = create_student(Config())
    assert kwargs == {"img_size": 64, "patch_size": 8, "num_classes": 10}
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert Config(model_kwargs={"img_size": 32, "depth": 2}).model_kwargs == {
        "img_size": 32,
        "patch_size": 8,
        "depth": 2,
    }
    assert Config(data="photos").model_kwargs == {}


def test_arguments_that_shape_no_model_are_refused():
    with pytest.raises(TrainingError, match="got checkpoint_path"):
        create_student(Config(model_kwargs={"checkpoint_path": "x.pth"}))


def test_a_share_drops_the_limits_of_a_mass(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mass: 0.9\nmax_keep: 40\nstatic: true\n")
    assert read_config(path, {}).limits == {"max_keep": 40, "static": True}
    assert read_config(path, {"mass": 0.8, "max_keep": 30}).limits == {"max_keep": 30, "static": True}
    share = read_config(path, {"keep": 0.5})
    assert (share.density, share.limits) == (("keep", [0.5, 0.5]), {"max_keep": None, "static": False})
    with pytest.raises(TrainingError, match=r"with min_keep, max_keep or static, got keep=0\.5"):
        read_config(path, {"keep": 0.5, "max_keep": 30})


def test_changes_on_the_command_line():
    assert parse_change("lr=1.0e-3") == ("lr", 0.001)
    assert parse_change("keep=[0.3, 0.7]") == ("keep", [0.3, 0.7])
    assert parse_change("ema=null") == ("ema", None)
    for text in ("lr", "keep=[0.3"):
        with pytest.raises(TrainingError, match=r"^--set: "):
            parse_change(text)


@pytest.mark.parametrize("name", ["canvas", "deit_small_imagenet"])
def test_the_configs_of_the_package_are_known_by_name(name, tmp_path, monkeypatch):
    config = read_config(name, {})
    assert config.mode == "alternate"
    assert config.density == ("keep", [0.3, 0.7])
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("epochs: 7\n")
    assert read_config(name, {}).epochs == 7, "a file that is there is meant"


def test_a_config_that_is_not_there():
    with pytest.raises(TrainingError, match=r"cannot read camvas: .*Known by name: canvas, deit_small_imagenet\.$"):
        read_config("camvas", {})


def test_keep_is_a_share_in_a_file():
    """1 is 1.0, not one patch; another whole number may be meant as one, and is refused."""
    for written in ({"keep": 1}, {"keep": [1, 1]}):
        config = from_dict({**written, "eval_keep": [1, 0.5]}, "test")
        assert config.density == ("keep", [1.0, 1.0])
        assert all(isinstance(share, float) for share in config.eval_keep)
    for written in ({"keep": 88}, {"keep": [0.5, 88]}, {"eval_keep": [0.5, 88]}, {"keep": 0}):
        with pytest.raises(
            TrainingError, match=r"keep: expected a share in \(0, 1\], got (88|0); write one such as 0.45"
        ):
            from_dict(written, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrr": 1}, "there is no key 'lrr'; did you mean lr?"),
        ({"xyzzy": 1}, "there is no key 'xyzzy'; there are model, "),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"epochs": 2.5}, "epochs: expected int, got 2.5"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ({"epochs": 0}, "epochs: expected 1 or more, got 0"),
        ({"teacher": 3}, "teacher: expected str or null, got 3"),
        ({"tensorboard": 1}, "tensorboard: expected bool, got 1"),
        ({"mode": "both"}, "mode: expected one of alternate, dense, sparse, got 'both'"),
        ({"amp": "fp16"}, "amp: expected one of none, bf16"),
        ({"keep": 1.5}, "keep"),
        ({"keep": [0.7, 0.3]}, "expected a number or [least, greatest]"),
        ({"keep": 0.5, "mass": 0.5}, "expected one of keep and mass, got both"),
        ({"max_keep": 40}, "mass: expected a number with min_keep, max_keep or static, got keep=0.45"),
        ({"keep": 0.5, "static": True}, "mass: expected a number with min_keep, max_keep or static, got keep=0.5"),
        ({"mass": 0.9, "max_keep": 0}, "max_keep: expected at least min_keep = 1, got 0"),
        ({"mass": 0.9, "max_keep": 0.5}, "max_keep: expected int or null, got 0.5"),
        ({"mass": 0.9, "static": 1}, "static: expected bool, got 1"),
        ({"score": "best"}, "score: expected one of cls, column, cls_value, random"),
        ({"eval_keep": [0.0]}, "keep"),
        ({"mixup": 0.8, "batch": 9}, "batch: mixup and cutmix pair images"),
        ({"logit_alpha": 1.0}, "logit_alpha: there is no teacher"),
        ({"manifold_alpha": 1.0, "teacher": "x", "mass": 0.9}, "manifold_alpha: expected keep"),
        ({"crop_scale": [0.5]}, "crop_scale: expected [least, greatest]"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(TrainingError) as error:
        read_config(None, changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("- a\n- b\n", "expected lines of"), ("lr: [1", "is no YAML"), ("laarning: 1", "no key")],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TrainingError, match=message):
        read_config(path, {})
