"""Plans of trees, and what they refuse."""

import pytest

from anabranch.federated.tree.plan import BASE, FedEEC, TreePlan, changed


def test_variants_are_changes_of_the_settings():
    plan = TreePlan(settings=FedEEC(beta=2.0), also=("rectify=off", "networks=mlp:8,mlp:8,mlp:9,sequential=true"))
    variants = plan.variants()
    assert list(variants) == [BASE, *plan.also]
    assert variants["rectify=off"] == FedEEC(beta=2.0, rectify="off")
    other = variants["networks=mlp:8,mlp:8,mlp:9,sequential=true"]
    assert other == FedEEC(beta=2.0, networks=("mlp:8", "mlp:8", "mlp:9"), sequential=True)
    assert changed(FedEEC(beta_inner=3.0), "beta_inner=none").beta_inner is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FedEEC(networks=("mlp",)), "two at least"),
        (lambda: FedEEC(temperature=0), "temperature must be positive"),
        (lambda: FedEEC(beta_inner=-1.0), "beta_inner must not be negative"),
        (lambda: FedEEC(ce=float("nan")), "ce must not be negative"),
        (lambda: FedEEC(migrate=1.5), "migrate must be in"),
        (lambda: TreePlan(public=0.0), "public must be in"),
        (lambda: TreePlan(tree=(12,)), "a tree of 2 tiers needs as many networks"),
        (lambda: TreePlan(also=("networks=mlp,mlp",)), "a tree of 3 tiers needs as many networks"),
        (lambda: TreePlan(tree=(1, 5), settings=FedEEC(migrate=0.1)), "two parents or more"),
        (lambda: TreePlan(also=("speed=9",)), "settings 'speed=9' has no option 'speed'"),
        (lambda: TreePlan(also=("off",)), "NAME=VALUE"),
    ],
)
def test_plans_that_cannot_be(make, said):
    with pytest.raises(ValueError, match=said):
        make()
