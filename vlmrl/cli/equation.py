"""The loss that a run would minimize, as an equation with the numbers of its config (`explain algorithm`).

The symbols are those of trainer/loss.py and objective.py, whose functions compute it; orchestrator/credit.py and
advantages.py compute A.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from omegaconf import DictConfig, OmegaConf

from vlmrl.config.algorithm import (
    Advantage,
    AlgorithmConfig,
    Compare,
    Credit,
    Divergence,
    FilterMode,
    ImportanceCorrection,
    KLEstimator,
    Loss,
    Truncated,
)
from vlmrl.config.critic import GAELevel
from vlmrl.config.dpo import DPOConfig, PreferenceLoss
from vlmrl.config.run import Mode

LOSSES = {
    Loss.grpo: "−1/T Σ_t min({r}_t A_t, clip({r}_t, {low}, {high}) A_t)",
    Loss.ppo: "−1/T Σ_t min({r}_t A_t, clip({r}_t, {low}, {high}) A_t)",
    Loss.dr_grpo: "−1/(S · {longest}) Σ_t min({r}_t A_t, clip({r}_t, {low}, {high}) A_t)",
    Loss.dapo: "−1/T Σ_t min({r}_t A_t, clip({r}_t, {low}, {high}) A_t)",
    Loss.rloo: "−1/S Σ_i Σ_t sg({r}_it) A_it log π_it",
    Loss.gspo: "−1/S Σ_i 1/|i| Σ_t min(s_it A_it, clip(s_it, {low}, {high}) A_it)",
    Loss.cispo: "−1/T Σ_t sg(clip({r}_t, {low}, {high})) A_t log π_t",
}
"""Loss → its equation, with the bounds of the clip. `r` is the name of its ratio."""

ADVANTAGES = {
    Advantage.group_normalized: "(R − mean(R)) / (std(R) + 1e-6)",
    Advantage.group_centered: "R − mean(R)",
    Advantage.leave_one_out: "R − mean of the others' R",
    Advantage.none: "0: rewards teach nothing",
    Advantage.gae: "δ_t + {lam} d_t A_{t+1}",
}

ESTIMATORS = {
    KLEstimator.k1: "−d",
    KLEstimator.k2: "d² / 2",
    KLEstimator.k3: "exp(d) − d − 1",
}


DIVERGENCES = {
    Divergence.forward: "KL(q ‖ π)",
    Divergence.reverse: "KL(π ‖ q)",
    Divergence.jensen_shannon: "{beta} KL(q ‖ m) + {rest} KL(π ‖ m)",
}


@dataclass(frozen=True)
class Minimized:
    """What the equation reads of a config."""

    algorithm: AlgorithmConfig
    max_new_tokens: int
    demonstrations: float = 0.0
    """`trainer.warmup.rl_weight` of a run with a warm-up, else 0."""

    is_supervised: bool = False
    """mode=sft."""
    pairs: DPOConfig | None = None
    """With mode=dpo: what a pair of answers costs."""
    sampled: str = "temperature=1"
    """What the sampler does to a distribution: `temperature=1, top_k=20`."""

    @classmethod
    def of(cls, config: DictConfig) -> Minimized:
        """What a composed config says."""
        warmup = config.trainer.warmup
        return cls(
            algorithm=cast("AlgorithmConfig", OmegaConf.to_object(config.algorithm)),
            max_new_tokens=config.orchestrator.max_new_tokens,
            sampled=_sampled(config.orchestrator),
            demonstrations=warmup.rl_weight if warmup.steps else 0.0,
            is_supervised=config.mode is Mode.sft,
            pairs=cast("DPOConfig", OmegaConf.to_object(config.dpo)) if config.mode is Mode.dpo else None,
        )


def equation(setting: Minimized) -> Iterator[str]:
    """The lines: the loss, then each symbol in it."""
    if setting.is_supervised:
        yield _line("L", "−1/T Σ_t log π_t of the demonstrations", "mode=sft; algorithm has no effect")
        return
    if setting.pairs is not None:
        yield from _pairs(setting.pairs)
        return
    yield from _loss(setting)
    yield from _ratio(setting.algorithm)
    yield from _terms(setting)
    yield from _advantage(setting.algorithm)
    yield from _reward(setting)
    yield from _batch(setting.algorithm, setting.sampled)


def _line(name: str, text: str, source: str = "") -> str:
    """One line: a symbol, what it is, and the key that says so.

    >>> _line("w_t", "min(m_t, 2)", "importance_correction=truncated")
    '    w_t = min(m_t, 2)                                         importance_correction=truncated'
    >>> _line("A ←", "w A")
    '    A ← w A'
    """
    sign = "=" if name and not name.endswith("←") else ""
    left = " ".join(part for part in (name, sign, text) if part)
    return f"    {left:<57} {source}".rstrip()


def _pairs(dpo: DPOConfig) -> Iterator[str]:
    """The loss of pairs of answers (trainer/preference.py)."""
    beta, wrong = number(dpo.beta), dpo.label_smoothing
    if dpo.loss is PreferenceLoss.ipo:
        loss = f"1/P Σ (h − {number(1 / (2 * dpo.beta))})²"
    elif wrong:
        loss = f"−1/P Σ ({number(1 - wrong)} log σ({beta} h) + {number(wrong)} log σ(−{beta} h))"
    else:
        loss = f"−1/P Σ log σ({beta} h)"
    more = f" − {number(dpo.sft_weight)} · 1/P Σ log π(w) / |w|" if dpo.sft_weight else ""
    yield _line("L", loss + more, "mode=dpo; algorithm has no effect")
    yield _line("h", "log π(w) − log reference(w) − (log π(l) − log reference(l))")
    yield _line("", f"{'means' if dpo.length_normalized else 'sums'} over the tokens of an answer", "length_normalized")
    yield _line("P", "pairs of the batch; w: the better answer, l: the worse one; |w|: its tokens")


def _sampled(config: DictConfig) -> str:
    """The keys of `orchestrator` that say from which distribution tokens are sampled."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    cuts = [f"{key}={number(config[key])}" for key, none in off.items() if config[key] != none]
    return ", ".join([f"temperature={number(config.temperature)}", *cuts])


def number(value: float) -> str:
    """A number as people write it.

    >>> number(1 - 3e-4), number(float("inf")), number(1e-6), number(2.0)
    ('0.9997', '∞', '1e-06', '2')
    """
    return "∞" if value == float("inf") else f"{value:.10g}"


def _loss(setting: Minimized) -> Iterator[str]:
    algorithm = setting.algorithm
    terms = []
    if algorithm.entropy_coef:
        terms.append(f" − {number(algorithm.entropy_coef)} · 1/T Σ_t H_t")
    if algorithm.kl.loss:
        terms.append(f" + {number(algorithm.kl.loss)} · 1/T Σ_t k_t")
    if algorithm.distill.weight:
        terms.append(f" + {number(algorithm.distill.weight)} · 1/T Σ_t D_t")
    if setting.demonstrations:
        terms.append(f" + {number(setting.demonstrations)} · η/η_max · D")
    if algorithm.advantage == Advantage.gae:
        terms.append(f" + {number(algorithm.value.coef)} · L_V")
    known = [each for each in Loss if each == algorithm.loss]
    if not known:
        yield _line("L", f"{algorithm.loss}(tokens, totals, config)" + "".join(terms), "a loss of your own")
        if algorithm.args:
            yield _line("", "config.args = " + ", ".join(f"{k}={v}" for k, v in algorithm.args.items()))
        return
    (loss,) = known
    body = LOSSES[loss].format(
        r="r" if algorithm.importance_correction is ImportanceCorrection.own else "ρ",
        low=number(1 - algorithm.clip_low),
        high=number(1 + algorithm.clip_high),
        longest=setting.max_new_tokens,
    )
    yield _line("L", body + "".join(terms))
    if algorithm.clip_dual is not None and "min(" in body:
        yield _line("min(…) ←", f"max(min(…), {number(algorithm.clip_dual)} A) where A < 0", "clip_dual")
    if loss is Loss.gspo:
        old = "μ" if algorithm.importance_correction is ImportanceCorrection.own else "π_old"
        yield _line("s_i", f"exp(1/|i| Σ_t (log π_it − log {old}_it))")
        yield _line("s_it", "sg(s_i) · π_it / sg(π_it)")


def _ratio(algorithm: AlgorithmConfig) -> Iterator[str]:
    """The ratio, and what corrects for tokens of another policy."""
    correction, cap = algorithm.importance_correction, number(algorithm.importance_cap)
    is_own = correction is ImportanceCorrection.own
    has_ratio = algorithm.loss in [*Loss] and algorithm.loss != Loss.gspo
    if is_own and has_ratio:
        yield _line("r_t", "π(token) / μ(token)", "importance_correction=own")
    if is_own:
        return
    if has_ratio:
        yield _line("ρ_t", "π(token) / π_old(token)")
    weight = {
        ImportanceCorrection.truncated: f"min(m_t, {cap})",
        ImportanceCorrection.masked: f"m_t if {number(1 / algorithm.importance_cap)} ≤ m_t ≤ {cap}, else 0",
        ImportanceCorrection.none: "1",
    }[correction]
    yield _line("w_t", weight, f"importance_correction={correction.name}")
    if correction is not ImportanceCorrection.none:
        yield _line("m_t", "π_old(token) / μ(token)")


def _terms(setting: Minimized) -> Iterator[str]:
    """The symbols of the terms beside the loss."""
    algorithm = setting.algorithm
    if algorithm.entropy_coef:
        yield _line("H_t", "entropy of π where token t was sampled, in nats", "entropy_coef")
    if algorithm.kl.loss:
        yield _line("k_t", ESTIMATORS[algorithm.kl.estimator], f"kl.loss, kl.estimator={algorithm.kl.estimator}")
        yield _line("d", "log reference − log π of token t")
    if algorithm.distill.weight:
        distill = algorithm.distill
        beta, rest = number(distill.beta), number(1 - distill.beta)
        source = f"distill.weight, distill.divergence={distill.divergence}"
        yield _line("D_t", DIVERGENCES[distill.divergence].format(beta=beta, rest=rest), source)
        if distill.divergence is Divergence.jensen_shannon:
            yield _line("m", f"{beta} q + {rest} π", "distill.beta")
        yield _line("q", f"the reference, at its {distill.top_k} most likely tokens and all others as one")
    if algorithm.advantage == Advantage.gae:
        near, clip = "(V_t − R_t)²", algorithm.value.clip
        if clip is not None:
            near = f"max({near}, (V_old,t + clip(V_t − V_old,t, ±{number(clip)}) − R_t)²)"
        yield _line("L_V", f"1/2T Σ_t {near}", "value")
        yield _line("V_t", "the value before token t, by the policy's own value head; V_old: before the batch")
        yield _line("R_t", "A_t + V_old,t")
    if setting.demonstrations:
        yield _line("D", "−1/T' Σ_t log π_t of the step's demonstrations", "trainer.warmup.rl_weight")
        yield _line("η", "the learning rate of the step, η_max: its highest")


def _advantage(algorithm: AlgorithmConfig) -> Iterator[str]:
    name = algorithm.advantage
    known = [each for each in Advantage if each == name]
    text = ADVANTAGES[known[0]] if known else f"{name}(compared, config)"
    if name == Advantage.gae:
        text = text.replace("{lam}", number(algorithm.gae.lam))
    yield _line("A_t", text, f"advantage={name}" if known else "an advantage of your own")
    if name == Advantage.gae:
        yield from _value_errors(algorithm)
    if algorithm.vision_advantage.is_on:
        looking = algorithm.vision_advantage
        yield _line("A_t ←", "A_t · v / mean(v), for turns with images", "vision_advantage")
        yield _line("v", f"1 + {number(looking.weight)} · min(max(g, 0), {number(looking.cap)})")
        yield _line("g", "mean of log μ(token | images) − log π(token | other images)")
    if algorithm.kl.advantage:
        yield _line("A_t ←", f"A_t − {number(algorithm.kl.advantage)} · (log μ_t − log reference_t)", "kl.advantage")
    if algorithm.importance_correction is not ImportanceCorrection.own:
        yield _line("A_t ←", "w_t A_t")


def _value_errors(algorithm: AlgorithmConfig) -> Iterator[str]:
    """What an advantage from a value function is made of."""
    action = "the turn" if algorithm.gae.level is GAELevel.turn else "the token"
    later = {Credit.episode: 1.0, Credit.turn: 0.0, Credit["return"]: algorithm.discount}[algorithm.credit]
    gamma = algorithm.gae.gamma
    yield _line("δ_t", "r_t + d_t V_{t+1} − V_t, by V_old", f"gae.level={algorithm.gae.level.name}")
    yield _line("r_t", f"R, where {action} ends what is rewarded, else 0")
    between = f"{number(gamma * later)} to the next turn, 0 at the end"
    yield _line("d_t", between if algorithm.gae.level is GAELevel.turn else f"{number(gamma)}, {between}", "gae.gamma")
    if algorithm.gae.whiten:
        yield _line("A_t ←", "(A_t − mean(A)) / std(A) of the batch", "gae.whiten")


def _reward(setting: Minimized) -> Iterator[str]:
    """What A compares: the rewards of the task, and what is taken off them."""
    algorithm = setting.algorithm
    credit, r = algorithm.credit, "r" if algorithm.credit is Credit["return"] else "R"
    if credit is Credit.episode:
        among = "among siblings"
    elif algorithm.compare is Compare.state:
        among = "among turns that saw the same"
    else:
        among = "among the same turns of siblings"
    if algorithm.advantage == Advantage.gae:
        r, among = "R", "from which the value is subtracted"
    if credit is Credit["return"] and algorithm.advantage != Advantage.gae:
        yield _line("R", f"r + {number(algorithm.discount)} · R of the next turn, {among}", "credit=return")
    of = "the episode" if credit is Credit.episode else "the turn"
    yield _line(r, f"reward of {of}" + (f", {among}" if r == "R" else ""), f"credit={credit.name}" if r == "R" else "")
    cut = {
        Truncated.zero: f"min({r}, 0) for a cut answer",
        Truncated.keep: f"{r} for a cut answer, too",
        Truncated.mask: "none for a cut answer, which is left out",
    }[algorithm.truncated]
    yield _line(f"{r} ←", cut, f"truncated={algorithm.truncated.name}")
    if algorithm.kl.reward:
        yield _line(f"{r} ←", f"{r} − {number(algorithm.kl.reward)} · Σ_t (log μ_t − log reference_t)", "kl.reward")
    overlong = algorithm.overlong
    if overlong.is_on:
        longest = setting.max_new_tokens if overlong.longest is None else overlong.longest
        start, width = longest - overlong.tokens, overlong.tokens
        part = f"min(max(n − {start}, 0), {width}) / {width}"
        yield _line(f"{r} ←", f"{r} − {number(overlong.penalty)} · {part}, n tokens", "overlong, for each answer")


def _batch(algorithm: AlgorithmConfig, sampled: str) -> Iterator[str]:
    """What the sums run over."""
    drops = algorithm.filters.zero_advantage is FilterMode.drop or algorithm.refill.is_on
    yield _line("T, S", "loss tokens and samples of the batch" + (", of groups whose A differ" if drops else ""))
    if algorithm.refill.is_on:
        yield _line("", f"a step plays up to {algorithm.refill.budget} times its groups until all have one", "refill")
    yield _line("π, μ", "the policy that is trained, and the one that sampled", sampled)
    steps = algorithm.epochs * algorithm.minibatches
    if algorithm.importance_correction is not ImportanceCorrection.own or algorithm.target_kl is not None:
        only = "" if steps > 1 else ": π itself, so ρ = 1 with the gradient of log π"
        yield _line("π_old", f"π before the batch{only}")
    if steps > 1:
        yield _line(
            "",
            f"{steps} optimizer steps per batch: {algorithm.epochs} × {algorithm.minibatches}",
            "epochs × minibatches",
        )
    if algorithm.target_kl is not None:
        yield _line("", f"a batch ends where KL(π_old ‖ π) > {number(algorithm.target_kl)} nats per token", "target_kl")
    yield _line("sg(x)", "the value of x without its gradient")
