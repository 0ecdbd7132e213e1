"""A mixer's declaration: what is a slip is refused when a layer is built, and gates go by their role."""

import pytest
import torch

from linear_moe.mcore.arguments import config_argv
from linear_moe.mcore.checks import check_arguments
from linear_moe.ssm import MIXERS, HeadParameter, Projection, mixer_class
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.declaration import check_declaration
from linear_moe.ssm.gla import GatedLinearAttention
from tests.helpers import rel_err
from tests.mcore.test_arguments import MODEL, parse
from tests.mixers import Toy

D, HEADS = 16, 2
READ, WRITE, GATE = (Projection(width=8, role=role) for role in ("read", "write", "gate"))


def toy(projections=None, heads=None, shared=None, **options):
    """Toy with other or further declarations."""

    class Changed(Toy):
        def projections(self):
            return super().projections() | (projections or {})

        def parameters_per_head(self):
            return super().parameters_per_head() | (heads or {})

        def shared_parameters(self):
            return super().shared_parameters() | (shared or {})

    return Changed(Changed.make_config(D, HEADS, options))


def write(**options):
    return {"k": Projection(**{"width": 8, "role": "write", "per": "key"} | options)}


ONE_EACH = HeadParameter(init=torch.zeros)
SLIPS = {  # name: (declaration, message)
    "role": ({"projections": write(role="writes")}, "role must be one of 'read', 'write', 'gate', but is 'writes'"),
    "per": ({"projections": write(per="keys")}, "'k': per must be one of 'key', 'value', but is 'keys'"),
    "activation": ({"projections": write(activation="relu")}, "activation must be one of 'silu', None, but is 'relu'"),
    "inner": ({"projections": write(low_rank=2, inner="silu")}, "inner must be one of 'tanh', 'sigmoid', None, but is"),
    "inner of no low_rank": ({"projections": write(inner="tanh")}, r"inner \('tanh'\) has no effect without low_rank"),
    "width": ({"projections": write(width=0)}, "'k': width must be at least 1, but is 0"),
    "low_rank": ({"projections": write(low_rank=-1)}, "'k': low_rank must be at least 0, but is -1"),
    "two gates": ({"projections": {"gate": GATE, "other": GATE}}, "at most one .* the role gate, but gate, other have"),
    "an argument of recur": ({"projections": {"scan": WRITE}}, "projection 'scan' has a name that is already used"),
    "no name": ({"projections": {"a.b": WRITE}}, "'a.b' must have a name that can be a Python argument"),
    "head per": ({"heads": {"a": HeadParameter(init=torch.zeros, per="all")}}, "parameter 'a': per must be one of"),
    "head named as shared": ({"heads": {"norm": ONE_EACH}}, "shared parameter 'norm' has a name that is already used"),
    "head named as projection": ({"heads": {"k": ONE_EACH}}, "head parameter 'k' has a name that is already used"),
    "named as the layer's": ({"projections": {"out": WRITE}}, "projection 'out' has a name that is already used"),
    "head named as module": ({"heads": {"half": ONE_EACH}}, "head parameter 'half' has a name that is already used"),
    "shared named as module": ({"shared": {"training": lambda: torch.ones(1)}}, "'training' has a name that is"),
    "conv_size": ({"conv_size": 4}, r"conv_size \(4\) has no effect, for no projection has conv"),
    "head named as conv": (
        {"projections": write(conv=True), "heads": {"conv_k": ONE_EACH}},
        "head parameter 'conv_k' has a name that is already used",
    ),
} | {
    f"{option} of a gate": (
        {"projections": {"z": Projection(width=8, role="gate", **{option: value})}},
        rf"'z': {option} \({value!r}\) has no effect on a gate",
    )
    for option, value in (("conv", True), ("normalize", True), ("activation", "silu"))
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_refused(slip):
    declaration, message = SLIPS[slip]
    with pytest.raises(ValueError, match=message):
        MixerCore(toy(**declaration), D)


def test_head_parameters_start_with_the_heads():
    with pytest.raises(ValueError, match=r"'a' must start with its value heads \(2\), but init makes \[8, 2\]"):
        MixerCore(toy(heads={"a": HeadParameter(init=lambda heads: torch.zeros(8, heads))}), D)


@pytest.mark.parametrize("conv_size", [0, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_our_mixers_pass(name, conv_size):
    cls = mixer_class(name)
    config = cls.make_config(D, HEADS, {"conv_size": conv_size})
    for layer in range(2):
        check_declaration(cls(config, layer, 2))


class Renamed(GatedLinearAttention):
    """The same but for the gate's name."""

    def projections(self):
        projections = super().projections()
        return {"z" if name == "gate" else name: spec for name, spec in projections.items()}


def test_a_gate_goes_by_its_role(seed):
    config = Renamed.make_config(D, HEADS, {})
    answers = []
    for cls in (GatedLinearAttention, Renamed):
        torch.manual_seed(seed)
        core = MixerCore(cls(config), D)
        core.initialize(lambda weight: weight.normal_(0, 0.3))
        answers.append(core(torch.randn(2, 9, D)))
    assert rel_err(answers[1], answers[0]) == 0


class Slip(Toy):
    def projections(self):
        return super().projections() | write(role="writes")


def test_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="Slip: projection 'k': role must be one of"):
        check_arguments(parse([*config_argv(MODEL), "--mixer", f"{__name__}:Slip"]))
