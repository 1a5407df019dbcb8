"""What later modes of a command need is checked before the first one begins."""

from pathlib import Path

import pytest

from run_lib import modes
from run_lib.experiment import Experiment
from tests import tiny

WITH_FEATURES = {"features": "classifier", "enable_sampling": True}


def check(workdir: Path, names: str, **changes: object) -> None:
    c = tiny.config()
    c.eval.update({"stats": str(workdir / "stats.npz")} | changes)
    modes.check(Experiment.from_config(c), modes.Command(workdir), names.split(","))


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ("train,eval", {"features": "classifer"}, r"eval\.features='classifer'"),
        ("train,eval", WITH_FEATURES, r"there are no statistics .*stats\.npz"),
        ("train,eval", WITH_FEATURES | {"num_samples": 1}, r"eval\.num_samples=1: need 2"),
        ("train,eval", {"dequantizer": True}, "no dequantiser in .*: run --mode=train_deq"),
        ("train,eval", {"dequantization": "uniform,variational"}, "no dequantiser in "),
        ("train,eval", {"dataset": "validation"}, r"eval\.dataset='validation'"),
        ("train,eval", {"end_ckpt": 3, "begin_ckpt": 1}, r"eval\.end_ckpt=3: need at most 2"),
        ("train,eval", {"elbo": True}, r"eval\.elbo=True with model\.parameterization"),
        ("train,diagnose", {"dataset": "validation"}, r"eval\.dataset='validation'"),
        ("fid_stats,eval", {}, "no checkpoint in "),
        ("fid_stats,train_deq", {}, "no checkpoint in "),
        ("train,fid_stats", {"features": ""}, r"--mode=fid_stats needs --config\.eval\.features"),
        ("train,import", {}, r"training\.init_from='': say which"),
    ],
)
def test_what_is_missing_is_said_first(
    tmp_path: Path, names: str, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(tmp_path, names, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("four_devices_here")
def test_a_batch_that_the_devices_cannot_share_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.batch_size=6: must be a multiple of the 4"):
        check(tmp_path, "train,eval", batch_size=6)


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        ("train,eval,diagnose", {}),
        ("train,eval", {"end_ckpt": 2, "begin_ckpt": 1}),
        ("train,train_deq,eval", {"dequantizer": True}),
        ("fid_stats,train,eval", WITH_FEATURES),
        ("eval", {"features": "classifer"}),  # which checks itself when it begins
    ],
)
def test_what_an_earlier_mode_makes_is_not_missing(
    tmp_path: Path, names: str, changes: dict
) -> None:
    check(tmp_path, names, **changes)
    assert not list(tmp_path.iterdir())
