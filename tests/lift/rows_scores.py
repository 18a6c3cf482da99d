"""The table of masked scores: name -> what reaches the softmax, from the scores `w`, the indices `i` and `j`, and inputs.

`x` holds `bias [b h s t]` and `slopes [h]`, floats, and `kept [b t]`, bools.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

INF, NAN, MIN = float("inf"), float("nan"), torch.finfo(torch.float32).min
Logits = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]


def causal(i: Tensor, j: Tensor, low: float = -INF) -> Tensor:
    return torch.where(j <= i, 0.0, low)


LIFTED: dict[str, Logits] = {
    "plain": lambda w, i, j, x: w * 1.0,
    "filled": lambda w, i, j, x: (w * 0.5).masked_fill(j > i, -INF),
    "filled_lowest": lambda w, i, j, x: w.masked_fill(j > i, MIN),
    "divided": lambda w, i, j, x: (w / 4.0).masked_fill(j > i, MIN),
    "chosen": lambda w, i, j, x: torch.where(j <= i, w, -INF),
    "chosen_otherwise": lambda w, i, j, x: torch.where(j > i, MIN, 0.25 * w),
    "added": lambda w, i, j, x: w * 0.5 + causal(i, j),
    "added_in_front": lambda w, i, j, x: causal(i, j, MIN) + w,
    "subtracted": lambda w, i, j, x: w - torch.where(j <= i, 0.0, INF),
    "added_twice": lambda w, i, j, x: w + causal(i, j, MIN) + causal(i, j, MIN),
    "added_and_filled": lambda w, i, j, x: (w + causal(i, j)).masked_fill((j < i - 3), MIN),
    "masked_then_scaled": lambda w, i, j, x: w.masked_fill(j > i, MIN) * 0.5,
    "masked_then_divided": lambda w, i, j, x: w.masked_fill(j > i, -INF) / 8.0,
    "scaled_twice": lambda w, i, j, x: (0.5 * w / 2.0).masked_fill(j > i, -INF),
    "scaled_negatively": lambda w, i, j, x: (w * -0.5).masked_fill(j > i, -INF),
    "taken_from_zero": lambda w, i, j, x: torch.where(j <= i, 0.0, -INF) - w,
    "widened": lambda w, i, j, x: (w.double() * 0.5).masked_fill(j > i, -INF),
    "capped": lambda w, i, j, x: (torch.tanh(w / 30.0) * 30.0).masked_fill(j > i, -INF),
    "capped_after_scale": lambda w, i, j, x: 20.0 * torch.tanh(w * 0.25) + causal(i, j, MIN),
    "capped_and_divided": lambda w, i, j, x: (torch.tanh(w) / 0.5).masked_fill(j > i, -INF),
    "biased": lambda w, i, j, x: w * 0.5 + x["bias"] + causal(i, j),
    "biased_in_front": lambda w, i, j, x: torch.where(j <= i, x["bias"] + w, -INF),
    "bias_taken_away": lambda w, i, j, x: (w - x["bias"]).masked_fill(j > i, -INF),
    "bias_scaled_with_scores": lambda w, i, j, x: ((w + x["bias"]) * 0.5).masked_fill(j > i, -INF),
    "bias_on_the_diagonal": lambda w, i, j, x: torch.where(i == j, w + x["bias"], w).masked_fill(j > i, -INF),
    "capped_and_biased": lambda w, i, j, x: torch.tanh(w * 0.5) * 9.0 + x["bias"] + causal(i, j),
    "alibi": lambda w, i, j, x: w * 0.5 + x["slopes"][:, None, None] * (j - i) + causal(i, j),
    "padded": lambda w, i, j, x: w.masked_fill(~x["kept"][:, None, None, :], MIN),
    "not_below_the_lowest": lambda w, i, j, x: torch.maximum(w + causal(i, j, MIN), torch.full((), MIN)),
    "capped_behind": lambda w, i, j, x: causal(i, j, MIN) + 20.0 * torch.tanh(w),
    "two_biases": lambda w, i, j, x: w + x["bias"] + x["slopes"][:, None, None] * (j - i).float() + causal(i, j),
    "lowest_made_small": lambda w, i, j, x: w.masked_fill(j > i, MIN) * 0.001,
    "many_cases": lambda w, i, j, x: w + sum(torch.where(j == n, MIN / 2**n, 0.0) for n in range(1, 9)),
    "not_below_in_front": lambda w, i, j, x: torch.maximum(torch.full((), MIN), w + causal(i, j, MIN)),
    "scaled_from_the_left": lambda w, i, j, x: torch.full((), 0.5) * w + causal(i, j),
    "masked_then_scaled_from_the_left": lambda w, i, j, x: torch.full((), 0.5) * w.masked_fill(j > i, MIN),
    "negated_from_the_left": lambda w, i, j, x: (torch.full((), -2.0) * w).masked_fill(j > i, -INF),
    "divided_negatively": lambda w, i, j, x: (w / -4.0).masked_fill(j > i, -INF),
    "bias_divided_with_scores": lambda w, i, j, x: ((w + x["bias"]) / 2.0).masked_fill(j > i, -INF),
    "capped_negatively": lambda w, i, j, x: (torch.tanh(w) * -5.0).masked_fill(j > i, -INF),
    "bias_and_cap_divided": lambda w, i, j, x: ((torch.tanh(w) + x["bias"]) / 0.5).masked_fill(j > i, -INF),
}

# name: (what reaches the softmax, what the refusal must say)
REFUSED: dict[str, tuple[Logits, str]] = {
    "times_mask": (lambda w, i, j, x: w * (j <= i), "it adds 0, which is a bias"),
    "filled_with_zero": (lambda w, i, j, x: w.masked_fill(j > i, 0.0), "it adds 0, which is a bias"),
    "filled_weakly": (lambda w, i, j, x: w.masked_fill(j > i, -1e4), "it adds -10000, which is a bias"),
    "filled_with_nan": (lambda w, i, j, x: w.masked_fill(j > i, NAN), "it can add"),
    "shifted": (lambda w, i, j, x: (w + 1.0).masked_fill(j > i, -INF), "it adds 1, which is a bias"),
    "raised": (lambda w, i, j, x: w.masked_fill(j > i, INF), "it adds inf, which is a bias"),
    "lowest_halved_too_often": (lambda w, i, j, x: w.masked_fill(j > i, MIN) * 1e-6, "which is a bias"),
    "lowest_made_too_small": (lambda w, i, j, x: w.masked_fill(j > i, MIN) * 0.0009, "which is a bias"),
    "too_many_cases": (
        lambda w, i, j, x: w + sum(torch.where(j == n, MIN / 2**n, 0.0) for n in range(1, 10)),
        "more than 256 cases",
    ),
    "scores_of_the_first_key": (lambda w, i, j, x: torch.where(j <= i, w, w[..., :1]), "mixes scores of other"),
    "scores_of_another_head": (lambda w, i, j, x: torch.where(j <= i, w, w.flip(1)), "mixes scores of other"),
    "lost_in_a_sum": (lambda w, i, j, x: w + (causal(i, j) + 1e30) - 1e30, "it turns its scores into"),
    "lost_in_a_difference": (lambda w, i, j, x: w - 1e30 + torch.where(j <= i, 1e30, -INF), "it turns its scores into"),
    "times_zero": (lambda w, i, j, x: w * 0.0 + causal(i, j), "it adds 0, which is a bias"),
    "divided_by_zero": (lambda w, i, j, x: w / 0.0 + causal(i, j), "it turns its scores into"),
    "negated_after_mask": (
        lambda w, i, j, x: torch.full((), -1.0) * w.masked_fill(j > i, -INF),
        "it adds inf, which is a bias",
    ),
    "divided_after_mask": (lambda w, i, j, x: w.masked_fill(j > i, -INF) / -2.0, "it adds inf, which is a bias"),
    "bounded_in_front": (lambda w, i, j, x: torch.maximum(torch.full((), -1.0), w) + causal(i, j), "it turns its scores into"),
    "bounded_by_mask": (lambda w, i, j, x: torch.maximum(w, causal(i, j)), "it turns its scores into"),
    "two_scales": (lambda w, i, j, x: torch.where(i == j, w * 2.0, w).masked_fill(j > i, -INF), "different factors"),
    "squared": (lambda w, i, j, x: (w * w).masked_fill(j > i, -INF), "it turns its scores into"),
    "added_to_itself": (lambda w, i, j, x: (w + w).masked_fill(j > i, -INF), "it turns its scores into"),
    "capped_twice": (lambda w, i, j, x: torch.tanh(torch.tanh(w)).masked_fill(j > i, -INF), "it turns its scores into"),
    "capped_when_shifted": (lambda w, i, j, x: torch.tanh(w + MIN).masked_fill(j > i, -INF), "it turns its scores into"),
    "capped_when_biased": (lambda w, i, j, x: torch.tanh(w + x["bias"]).masked_fill(j > i, -INF), "it turns its scores into"),
    "bounded": (lambda w, i, j, x: torch.maximum(w, torch.full((), -1.0)) + causal(i, j), "it turns its scores into"),
    "scaled_by_data": (lambda w, i, j, x: w * x["slopes"][:, None, None] + causal(i, j), "it turns its scores into"),
    "masked_then_negated": (lambda w, i, j, x: w.masked_fill(j > i, -INF) * -1.0, "it turns its scores into|it adds inf"),
    "only_a_bias": (lambda w, i, j, x: w + x["bias"], "a value that depends on data"),
}
