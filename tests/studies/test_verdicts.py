"""Sentences say what the numbers say: found, not found, could not have been found."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from tl_posheads.studies.ablation import verdicts


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


def positive(effect=-1.5, p=0.03):
    """Retrieval heads at both fractions: harm at the first alone, unless ``p`` says none."""
    rows = table().query("control == 'random' and variant == 'long'")
    low, high = effect - 0.3, effect + 0.3
    return rows.assign(effect=effect, ci_low=low, ci_high=high, p_adjusted=[p, 1.0], n_heads=[5, 9])


NONE = positive()[:0]


def verdict(
    rows, task, retrieval=None, *, clean=-0.5, calibrated=True, rungs=4, metric=False, **facts
):
    """Of a study with these tables; ``clean`` is each prompt's value without ablation."""
    facts = {"tasks": {task: {"rungs": rungs, "metric": metric}}, **facts}
    cells = pd.DataFrame({"task": task, "variant": "long", "condition": -1, "value": [clean] * 5})
    study = SimpleNamespace(
        to_pandas=lambda: rows,
        positive_control=lambda: positive() if retrieval is None else retrieval,
        cells=cells,
        calibration=pd.DataFrame({"rung": [0]}) if calibrated else pd.DataFrame(),
        provenance=facts,
    )
    return verdicts.verdict(study, task)


def test_found_and_of_long_context():
    said = verdict(table(), "passkey")
    assert said.startswith(
        "passkey (5 prompts): without the top 5 % of heads (14) the answers' log-probability "
        "per token goes from -0.10 to -2.10 nats (-2.00, 95 % interval over prompts like these "
        "-2.30 to -1.70)"
    )
    assert "random heads -0.25, heads of the same layers -0.50 on average" in said
    assert (
        ": evidence that these heads matter more than every control drawn, on these prompts" in said
    )
    assert "(p = 0.040 or less, corrected)" in said
    assert (
        "at short range it changes by -0.20, so that long context suffers more (p = 0.040)" in said
    )


def test_found_but_at_short_range_too():
    said = verdict(table(near=-1.9, p_gap=0.3), "passkey")
    assert ": evidence" in said
    assert "changes by -1.90, so that harm to long context can't be told from general harm" in said


def test_found_without_a_short_control():
    assert "there is no short-context control" in verdict(table(short=False), "passkey")


@pytest.mark.parametrize(
    ("detectable", "words"),
    [
        (0.5, "; minimum detectable effect: 0.50 below the draws' mean, in 4 of 5 such studies"),
        (float("inf"), "; no effect, however large, would have been found in 4 of 5 such studies"),
        (float("nan"), "(p = 0.210 corrected); the study can find harm"),
    ],
)
def test_not_found(detectable, words):
    said = verdict(table(p_far=0.2, detectable=detectable), "passkey")
    assert "no evidence that these heads matter more than heads of the same layers" in said
    assert "p = 0.210 corrected" in said
    assert words in said


def test_a_positive_control_says_that_harm_can_be_found():
    said = verdict(table(p_far=0.2), "passkey")
    assert said.endswith(
        "; the study can find harm: without 5 retrieval heads it is -1.50 (p = 0.030)."
    )
    # of the same size as the top ones where these did harm
    both = positive().assign(p_adjusted=0.01, effect=[-1.0, -3.0])
    assert "without 9 retrieval heads it is -3.00 (p = 0.010)" in verdict(
        table(p_far=0.2), "passkey", both
    )


@pytest.mark.parametrize("effect", [-0.05, 0.5])
def test_without_harm_in_the_positive_control_nothing_could_have_been_found(effect):
    rows = positive(effect, p=0.6 if effect < 0 else 0.01)
    said = verdict(table(p_far=0.2), "passkey", rows)
    assert "this study could not have detected harm from these heads, as the 5 best" in said
    assert f"retrieval heads show no harm either ({effect:+.2f}, 95 % interval" in said
    assert "no evidence" not in said
    # what was found was found
    assert ": evidence" in verdict(table(), "passkey", rows)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"n_heads": 0, "reason": "tiny answered none of 12 needles"}, "tiny answered none of 12"),
        ({"n_heads": 0, "reason": "no needles were asked for"}, "no needles were asked for"),
        ({"n_heads": 0}, "no head copied what was asked"),
        ({"n_heads": 9}, "no control has several draws"),
    ],
)
def test_why_there_is_no_positive_control(facts, why):
    said = verdict(table(p_far=0.2), "passkey", NONE, positive_control=facts)
    assert f"; there is no positive control, because {why}" in said


@pytest.mark.parametrize(
    ("clean", "side"), [(-0.01, "ceiling (probability 0.99"), (-3.0, "floor (probability 0.05")]
)
def test_a_task_at_its_ceiling_or_floor_could_show_nothing(clean, side):
    said = verdict(table(p_far=0.2), "passkey", clean=clean, calibrated=False)
    assert "this study could not have detected harm from these heads, as the task is at its" in said
    assert f"at its {side} per token without ablation)" in said
    for options in (dict(calibrated=True), dict(calibrated=False, rungs=0)):
        assert "no evidence" in verdict(table(p_far=0.2), "passkey", clean=clean, **options)
    assert "no evidence" in verdict(table(p_far=0.2), "passkey", calibrated=False)


def test_too_few_draws_or_prompts_could_show_nothing():
    few = table(p_far=0.2).assign(n_draws=12)
    assert "as no p-value of so few draws or prompts can be below 0.077" in verdict(few, "passkey")
    lowest = table(p_far=0.2).assign(control="lowest", n_draws=1)
    assert "no evidence that these heads matter more than the lowest heads" in verdict(
        lowest, "passkey"
    )
    assert "can be below 0.062" in verdict(lowest.assign(n_prompts=4), "passkey")


def test_a_metric_is_no_log_probability():
    said = verdict(table(p_far=0.2), "passkey", metric=True)
    assert "the answers' score goes from -0.10 to -2.10 (-2.00" in said


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
