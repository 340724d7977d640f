"""`explain algorithm`: the equation has the numbers of the config, and the form of the function that computes it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pytest

from support.command_line import REPOSITORY
from vlmrl.cli.equation import Minimized, equation
from vlmrl.cli.explain import explanation
from vlmrl.cli.recipe import with_recipe
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.algorithm import (
    Advantage,
    AlgorithmConfig,
    Compare,
    Credit,
    DistillConfig,
    Divergence,
    FilterConfig,
    FilterMode,
    ImportanceCorrection,
    KLConfig,
    KLEstimator,
    Loss,
    OverlongConfig,
    RefillConfig,
    Truncated,
    VisionAdvantageConfig,
)
from vlmrl.config.conf_folder import CONF
from vlmrl.config.critic import GAEConfig
from vlmrl.trainer.loss import LOSSES

RETURN = Credit["return"]


def lines_of(algorithm: AlgorithmConfig, demonstrations: float = 0.0) -> list[str]:
    """The lines, with single spaces."""
    return [" ".join(line.split()) for line in equation(Minimized(algorithm, 64, demonstrations))]


def documented(loss: Loss) -> list[str]:
    """The equations of the loss's docstring, with single spaces and without remarks behind them."""
    lines = re.findall(r"^ {8}(\S+ += .*)$", LOSSES[loss].__doc__ or "", re.MULTILINE)
    parts = [part for line in lines for part in re.split(r",?\s{3,}", re.sub(r" +=", " =", line))]
    return [part for part in parts if " = " in part]


def test_the_default_run() -> None:
    register_schemas()
    text = explanation(with_recipe(["algorithm"]), CONF)
    assert text.startswith(
        "algorithm=grpo\n"
        "  From rewards to a loss. There is one YAML file per algorithm; the functions name paper and\n"
        "  equation.\n"
        "  options: cispo, dapo, dr_grpo, grpo, gspo, ppo, rloo\n"
        "\n"
        "    L = −1/T Σ_t min(r_t A_t, clip(r_t, 0.8, 1.28) A_t) + 0.04 · η/η_max · D\n"
        "    r_t = π(token) / μ(token)                                 importance_correction=own\n"
        "    D = −1/T' Σ_t log π_t of the step's demonstrations        trainer.warmup.rl_weight\n"
        "    η = the learning rate of the step, η_max: its highest\n"
        "    A_t = (R − mean(R)) / (std(R) + 1e-6)                     advantage=group_normalized\n"
        "    R = reward of the turn, among the same turns of siblings  credit=turn\n"
        "    R ← min(R, 0) for a cut answer                            truncated=zero\n"
        "    T, S = loss tokens and samples of the batch\n"
        "    π, μ = the policy that is trained, and the one that sampled temperature=1\n"
        "    sg(x) = the value of x without its gradient\n"
        "\n"
        "algorithm.loss = grpo\n"
    )


@pytest.mark.parametrize(("loss", "correction"), list(itertools.product(Loss, ImportanceCorrection)))
def test_every_loss_and_correction_shows_its_numbers(loss: Loss, correction: ImportanceCorrection) -> None:
    config = AlgorithmConfig(
        loss=loss, importance_correction=correction, importance_cap=4.0, clip_low=0.125, clip_high=0.375
    )
    text = "\n".join(lines_of(config))
    assert text.startswith("L = −1/")
    assert ("0.875, 1.375" in text) == (loss is not Loss.rloo)
    assert ("−1/(S · 64)" in text) == (loss is Loss.dr_grpo)
    corrected = {
        ImportanceCorrection.own: "",
        ImportanceCorrection.truncated: "w_t = min(m_t, 4) importance_correction=truncated",
        ImportanceCorrection.masked: "w_t = m_t if 0.25 ≤ m_t ≤ 4, else 0 importance_correction=masked",
        ImportanceCorrection.none: "w_t = 1 importance_correction=none",
    }[correction]
    assert corrected in text
    is_own = correction is ImportanceCorrection.own
    assert ("w_t" in text) == ("A_t ← w_t A_t" in text) == (not is_own)
    assert ("importance_correction=own" in text) == (is_own and loss is not Loss.gspo)
    if loss is Loss.gspo:
        assert ("log π_old_it" in text) == (not is_own)
    else:
        assert ("ρ_t" in text) == (not is_own)


@pytest.mark.parametrize("loss", Loss)
def test_the_equation_is_that_of_the_function(loss: Loss) -> None:
    """Its docstring, with numbers in place of names: a change of one of the two is noticed here."""
    printed = lines_of(AlgorithmConfig(loss=loss, clip_low=0.125, clip_high=0.375))
    equations = documented(loss)
    assert equations
    for each in equations:
        expected = each.replace("1 − clip_low, 1 + clip_high", "0.875, 1.375").replace("max_new_tokens", "64")
        assert expected in printed


@pytest.mark.parametrize("loss", Loss)
def test_the_page_of_an_algorithm_has_its_equation(loss: Loss) -> None:
    page = (REPOSITORY / f"docs/algorithms/{loss}.md").read_text()
    flat = " ".join(page.split())
    assert all(" ".join(each.split()) in flat for each in documented(loss))
    (advantage,) = re.findall(r"^advantage: (\S+)", (CONF / f"algorithm/{loss}.yaml").read_text(), re.MULTILINE)
    assert f"`{advantage}`" in page
    for part in ("arxiv.org/abs/", "**Watch**", "**Its curve here**", "**It fails**"):
        assert part in page
    assert f"({loss}.md)" in (REPOSITORY / "docs/algorithms/index.md").read_text()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            AlgorithmConfig(entropy_coef=0.01, kl=KLConfig(loss=0.04, estimator=KLEstimator.k2)),
            [
                "L = −1/T Σ_t min(r_t A_t, clip(r_t, 0.8, 1.28) A_t) − 0.01 · 1/T Σ_t H_t + 0.04 · 1/T Σ_t k_t",
                "k_t = d² / 2 kl.loss, kl.estimator=k2",
            ],
        ),
        (
            AlgorithmConfig(epochs=3, minibatches=4, target_kl=0.05, clip_dual=3.0),
            [
                "min(…) ← max(min(…), 3 A) where A < 0 clip_dual",
                "12 optimizer steps per batch: 3 × 4 epochs × minibatches",
                "a batch ends where KL(π_old ‖ π) > 0.05 nats per token target_kl",
                "π_old = π before the batch\n",
            ],
        ),
        (
            AlgorithmConfig(
                loss=Loss.ppo,
                advantage=Advantage.gae,
                credit=Credit["return"],
                discount=0.5,
                gae=GAEConfig(gamma=0.8, lam=0.9),
            ),
            [
                "clip(r_t, 0.8, 1.28) A_t) + 0.1 · L_V",
                "L_V = 1/2T Σ_t max((V_t − R_t)², (V_old,t + clip(V_t − V_old,t, ±0.2) − R_t)²) value",
                "A_t = δ_t + 0.9 d_t A_{t+1} advantage=gae",
                "d_t = 0.8, 0.4 to the next turn, 0 at the end gae.gamma",
                "A_t ← (A_t − mean(A)) / std(A) of the batch gae.whiten",
                "R = reward of the turn, from which the value is subtracted credit=return",
            ],
        ),
        (
            AlgorithmConfig(loss=Loss.rloo, importance_correction=ImportanceCorrection.masked, clip_dual=3.0),
            ["ρ_t = π(token) / π_old(token)", "π_old = π before the batch: π itself, so ρ = 1"],
        ),
        (
            AlgorithmConfig(distill=DistillConfig(8, 0.5, Divergence.jensen_shannon, beta=0.1)),
            [
                " + 0.5 · 1/T Σ_t D_t",
                "D_t = 0.1 KL(q ‖ m) + 0.9 KL(π ‖ m) distill.weight, distill.divergence=jensen_shannon",
                "m = 0.1 q + 0.9 π distill.beta",
                "q = the reference, at its 8 most likely tokens and all others as one",
            ],
        ),
        (
            AlgorithmConfig(kl=KLConfig(reward=0.1, advantage=0.5)),
            [
                "A_t ← A_t − 0.5 · (log μ_t − log reference_t) kl.advantage",
                "R ← R − 0.1 · Σ_t (log μ_t − log reference_t) kl.reward",
            ],
        ),
        (
            AlgorithmConfig(truncated=Truncated.mask, overlong=OverlongConfig(tokens=16, penalty=0.5)),
            [
                "R ← none for a cut answer, which is left out truncated=mask",
                "R ← R − 0.5 · min(max(n − 48, 0), 16) / 16, n tokens overlong, for each answer",
            ],
        ),
        (
            AlgorithmConfig(truncated=Truncated.keep, overlong=OverlongConfig(tokens=16, longest=32)),
            ["R ← R for a cut answer, too truncated=keep", "R ← R − 1 · min(max(n − 16, 0), 16) / 16, n tokens"],
        ),
        (
            AlgorithmConfig(vision_advantage=VisionAdvantageConfig(weight=4.0, cap=1.5)),
            ["A_t ← A_t · v / mean(v), for turns with images", "v = 1 + 4 · min(max(g, 0), 1.5)"],
        ),
        (
            AlgorithmConfig(credit=RETURN, discount=0.9, compare=Compare.state, advantage=Advantage.leave_one_out),
            [
                "A_t = R − mean of the others' R advantage=leave_one_out",
                "R = r + 0.9 · R of the next turn, among turns that saw the same credit=return",
                "r ← min(r, 0) for a cut answer truncated=zero",
            ],
        ),
        (
            AlgorithmConfig(filters=FilterConfig(zero_advantage=FilterMode.drop), refill=RefillConfig(budget=10)),
            ["of groups whose A differ", "up to 10 times its groups"],
        ),
        (
            AlgorithmConfig(loss="mine.losses:sharp", advantage="mine.losses:brief", args={"scale": 0.5}),
            [
                "L = mine.losses:sharp(tokens, totals, config) a loss of your own",
                "config.args = scale=0.5",
                "A_t = mine.losses:brief(compared, config) an advantage of your own",
            ],
        ),
    ],
)
def test_what_goes_around_the_loss(config: AlgorithmConfig, expected: Sequence[str]) -> None:
    text = "\n".join(lines_of(config))
    for each in expected:
        assert each in text
    assert "D =" not in text


def test_what_is_sampled_from() -> None:
    register_schemas()
    cuts = ["orchestrator.temperature=0.7", "orchestrator.top_k=20", "orchestrator.min_p=0.05"]
    text = explanation(with_recipe(["algorithm", *cuts]), CONF)
    assert "the one that sampled temperature=0.7, top_k=20, min_p=0.05\n" in text


def test_a_supervised_run_has_no_rewards() -> None:
    found = list(equation(Minimized(AlgorithmConfig(), 64, is_supervised=True)))
    assert [" ".join(line.split()) for line in found] == [
        "L = −1/T Σ_t log π_t of the demonstrations mode=sft; algorithm has no effect"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "L = −1/P Σ log σ(0.1 h) mode=dpo; algorithm has no effect"),
        (("dpo.label_smoothing=0.25",), "L = −1/P Σ (0.75 log σ(0.1 h) + 0.25 log σ(−0.1 h)) mode=dpo"),
        (
            ("dpo.loss=ipo", "dpo.beta=0.25", "dpo.sft_weight=0.5"),
            "L = 1/P Σ (h − 2)² − 0.5 · 1/P Σ log π(w) / |w| mode=",
        ),
        (("dpo.length_normalized=true",), "means over the tokens of an answer"),
    ],
)
def test_a_run_on_pairs(overrides: Sequence[str], expected: str) -> None:
    register_schemas()
    text = " ".join(explanation(with_recipe(["algorithm", "mode=dpo", *overrides]), CONF).split())
    assert expected in text
    assert "A_t" not in text
