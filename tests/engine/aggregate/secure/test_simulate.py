"""Simulated rounds are exact, name who lies and report every step."""

import pytest

from anabranch.aggregate.secure.simulate import STEPS, Settings, simulate


@pytest.mark.parametrize("mode", ["direct", "mask"])
@pytest.mark.parametrize("proof", ["V1", "V2"])
def test_a_round_with_silent_and_lying_clients(mode, proof):
    said = []
    settings = Settings(clients=12, length=40, drop=2, corrupt=1, mode=mode, proof=proof, rounds=2)
    report = simulate(settings, said.append)
    assert report.exact
    assert (report.blocks, report.privacy) == (5, 3)
    assert report.wrong == (0,)
    assert report.accepted == tuple(range(12))
    assert tuple(phase.name for phase in report.phases) == (STEPS if proof == "V2" else STEPS[:5])
    assert all(phase.client_s > 0 and phase.bytes_down >= 0 for phase in report.phases)
    assert 0 < report.verified < 1
    assert said == ["meeting", "round 1 of 2", "round 2 of 2"]
    numbers = report.numbers()
    assert numbers["client_s"] == pytest.approx(sum(phase.client_s for phase in report.phases))
    share = report.phases[0]
    assert share.bytes_up > 11 * 8 * 4  # eleven sealed shares of 40 / 5 elements
    assert (share.bytes_up > 11 * (12 * 4 + 16) + 11 * 34 + 160) or mode == "direct"


@pytest.mark.parametrize("field", ["m31", "goldilocks"])
@pytest.mark.parametrize("step", ["share", "check", "agree", "project"])
def test_silence_from_any_step_on(field, step):
    report = simulate(Settings(clients=8, length=5, drop=1, field=field, drop_at=step, rounds=1))
    assert report.exact
    assert len(report.accepted) == (7 if step == "share" else 8)


def test_sizes_that_cannot_hold():
    with pytest.raises(ValueError, match="N - D >= 6"):
        simulate(Settings(clients=8, length=5, drop=4))
    with pytest.raises(ValueError, match="unknown field 'f7'"):
        Settings(clients=8, length=5, field="f7")
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        Settings(clients=8, length=5, rounds=0)
