"""The statistics of the scripts in results/, on small cases computed by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
pytest.importorskip("matplotlib")
import frontier  # noqa: E402
import page  # noqa: E402
import toy  # noqa: E402


def test_interval_is_students_t_over_seeds():
    # mean 2, standard deviation 1, t quantile 4.3027 for two degrees of freedom
    half = 4.3027 / 3**0.5
    assert page.interval([1.0, 2.0, 3.0], 3) == f"+2.000 [{2 - half:+.3f}, {2 + half:+.3f}]"


def test_fill_replaces_only_the_marked_parts(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("x\n<!-- b -->\nold\n<!-- end -->\ny\n<!-- c -->\nkept\n<!-- end -->\n")
    page.fill(str(tmp_path / "a.py"), b=(["h", 1], [["r", 2.5]]))
    table = "| h | 1 |\n| --- | --- |\n| r | 2.5 |"
    expected = f"x\n<!-- b -->\n{table}\n<!-- end -->\ny\n<!-- c -->\nkept\n<!-- end -->\n"
    assert file.read_text() == expected


def test_a_curve_is_interpolated_within_each_seed_and_not_extended():
    falls = np.array([[3.0, 1.0], [1.0, 2.0]])  # (betas, seeds)
    values = np.array([[30.0, 5.0], [10.0, 7.0]])
    np.testing.assert_allclose(frontier.at(falls, values, 2.0), [20.0, 7.0])
    np.testing.assert_allclose(frontier.at(falls, values, 2.5), [25.0, np.nan])


def test_the_chosen_is_read_where_the_rejected_first_fell_so_far():
    rejected, chosen = [0.0, -2.0, -1.0, -4.0], [0.0, 1.0, 9.0, -3.0]
    path = np.array([chosen, rejected]).T[:, None]  # (steps, 1 draw, 2)
    np.testing.assert_allclose(toy.chosen_at(path, [1.0, 3.0, 5.0])[:, 0], [0.5, 3.0, np.nan])


def test_all_betas_of_dpo_follow_one_path_in_the_toy(monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 150)
    first, second, _ = (toy.chosen_at(path, [0.3, 1.0]) for path in toy.shared_features("dpo"))
    both = ~np.isnan(first + second)
    assert both.sum() > 100
    np.testing.assert_allclose(first[both], second[both], atol=2e-2)


def test_a_step_of_the_policy_gradient_is_that_of_autograd(monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 1)
    base = toy.table_of_answers()
    logits = base.clone().requires_grad_()
    shares = logits.softmax(dim=1)
    kl = (shares * (logits.log_softmax(dim=1) - base)).sum()
    (gradient,) = torch.autograd.grad(shares[:, 0].sum() - 0.5 * kl, logits)
    moved = (base + toy.RATE / 0.5 * gradient).log_softmax(dim=1) - base
    np.testing.assert_allclose(toy.policy_gradient(0.5, None), moved[:, 0], rtol=1e-9)
    # With many draws the sampled step comes close to it, for an answer that is not rare.
    monkeypatch.setattr(toy, "DRAWS", 400)
    assert abs(toy.policy_gradient(0.5, 64)[0] - moved[0, 0]) < 0.1 * moved[0, 0]


def test_the_gradients_in_logits_are_those_of_autograd_through_a_softmax():
    for loss in ("dpo", "mio"):
        *_, in_w, in_l = toy.gradients(loss, 0.1, 3.0)
        start = torch.tensor([0.1, 0.5], dtype=torch.float64).log()
        others = 1 - (start - 3.0).exp().sum()
        logits = torch.cat([start - 3.0, others.log()[None]]).requires_grad_()
        logps = logits.log_softmax(0)[:2]
        value = toy.pair_loss(loss, *logps[:, None], *start[:, None], beta=1.0).sum()
        (slope,) = torch.autograd.grad(value, logits)
        assert [f"{x:+.3g}" for x in slope[:2]] == [in_w, in_l]


def test_the_origin_of_the_runs_has_singular_and_plural(tmp_path, monkeypatch):
    page_of_runs, runs = tmp_path / "a.md", []
    page_of_runs.write_text("<!-- made -->\n<!-- end -->\n<!-- table -->\n<!-- end -->\n")
    monkeypatch.setattr(page, "summarize", lambda runs: ({}, 1))
    monkeypatch.setattr(page, "table", lambda *args, **kwargs: "")
    for commit, threads in (("a", 1), ("b", 2)):
        runs.append(page.Run(tmp_path / commit, "", 0, {}))
        runs[-1].folder.mkdir()
        config = {"commit": commit, "machine": f"x86, {threads} threads", "versions": {"torch": 2}}
        page.write_json(runs[-1].folder / "train_config.json", config)
    page.write(str(tmp_path / "a.py"), runs)
    made = "in 0 wall-clock minutes (commits a and b,\ntorch 2, x86, 1 thread)"
    assert made in page_of_runs.read_text()
    page.write(str(tmp_path / "a.py"), runs[1:])
    assert "(commit b,\ntorch 2, x86, 2 threads)" in page_of_runs.read_text()
