"""What Muon needs and cannot do is refused before any work."""

import pytest

from linear_moe.mcore import muon
from linear_moe.mcore.arguments import config_argv
from linear_moe.mcore.checks import check_arguments
from tests.ssm.test_declaration import MODEL, parse


@pytest.mark.parametrize(
    ("flags", "installed", "message"),
    [
        ("", None, r"optimizer muon needs the extra `muon`: pip install 'linear-moe\[muon\]'"),
        ("--muon-no-split-qkv", True, "muon_no_split_qkv would make a linear layer's projections orthogonal to each"),
        ("--use-distributed-optimizer", True, "optimizer muon with use_distributed_optimizer is not supported with"),
    ],
    ids=["package", "split", "distributed"],
)
def test_refusals(flags, installed, message, monkeypatch):
    monkeypatch.setattr(muon, "find_spec", lambda name: installed)
    with pytest.raises(ValueError, match=message):
        check_arguments(parse([*config_argv(MODEL), "--optimizer", "muon", *flags.split()]))
