"""Sentences say what the numbers say: found, not found, could not have been found."""

from __future__ import annotations

import pandas as pd
import pytest

from tl_posheads.studies.ablation.verdicts import verdict


def table(*, p_far=0.03, p_gap=0.03, near=-0.2, detectable=0.5, lowest=False, short=True):
    rows = []
    for control in ("random", "layer_matched"):
        for variant, effect, p in (
            ("long", -2.0, p_far),
            ("short", near, 0.4),
            ("long - short", -2.0 - near, p_gap),
        ):
            if variant != "long" and not short:
                continue
            for fraction, worse in ((0.02, 0.5), (0.05, 0.0)):
                rows.append(
                    dict(
                        task="passkey",
                        variant=variant,
                        fraction=fraction,
                        n_heads=int(fraction * 280),
                        n_prompts=5,
                        unablated=-0.1,
                        effect=effect,
                        ci_low=effect - 0.3,
                        ci_high=effect + 0.3,
                        control=control,
                        control_effect=-0.25 if control == "random" else -0.5,
                        n_draws=32,
                        p=p,
                        p_adjusted=min(
                            1.0, p + worse + (0.01 if control == "layer_matched" else 0)
                        ),
                        smallest_detectable=detectable if variant == "long" else float("nan"),
                    )
                )
    if lowest:
        rows.append(
            {
                **rows[1],
                "control": "lowest",
                "n_draws": 1,
                "p_adjusted": 0.9,
                "control_effect": 0.01,
            }
        )
    return pd.DataFrame(rows)


def test_found_and_of_long_context():
    said = verdict(table(), "passkey")
    assert said.startswith(
        "passkey (5 prompts): without the top 5 % of heads (14) the scored tokens' log-probability "
        "goes from -0.10 to -2.10 nats a token (-2.00, 95 % interval -2.30 to -1.70)"
    )
    assert "random heads -0.25, heads of the same layers -0.50 on average" in said
    assert ": evidence that these heads matter more than every control drawn (p = 0.040" in said
    assert (
        "at short range it changes by -0.20, so that long context suffers more (p = 0.040)" in said
    )


def test_found_but_at_short_range_too():
    said = verdict(table(near=-1.9, p_gap=0.3), "passkey")
    assert ": evidence" in said
    assert "at short range it changes by -1.90, so that long context is not told from any" in said


def test_found_without_a_short_control():
    assert "there is no short-context control" in verdict(table(short=False), "passkey")


@pytest.mark.parametrize(
    ("detectable", "words"),
    [
        (0.5, "an effect of 0.50 below the draws' mean would have been found in 4 of 5 studies"),
        (float("inf"), "with so few draws no effect could have been found"),
        (float("nan"), "(p = 0.210 corrected)."),
    ],
)
def test_not_found(detectable, words):
    said = verdict(table(p_far=0.2, detectable=detectable), "passkey")
    assert "no evidence that these heads matter more than heads of the same layers" in said
    assert "p = 0.210 corrected" in said
    assert words in said


def test_one_control_that_does_as_much_is_enough_against():
    rows = table()
    rows.loc[(rows["control"] == "layer_matched") & (rows["variant"] == "long"), "p_adjusted"] = (
        0.06
    )
    assert "no evidence" in verdict(rows, "passkey")


def test_the_lowest_heads_are_told_of_and_decide_nothing():
    said = verdict(table(lowest=True), "passkey")
    assert "the lowest heads +0.01" in said
    assert ": evidence" in said
