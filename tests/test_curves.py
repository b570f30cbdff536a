"""Curves against values computed by hand, read back from the lines of the plot."""

import numpy as np
import pytest

from support.curves import COLORS, PANELS, STYLES, by_experiment, plot, read_curves
from support.files import write_json, write_rows


def make_run(folder, rows: list[dict], **config):
    folder.mkdir()
    write_json(folder / "train_config.json", config)
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def held_out(steps, chosen, loss) -> list[dict]:
    """Rows of metrics on held-out pairs, with a row of training between them."""
    names = "eval_logps/chosen", "eval_loss", "eval_rewards/rejected", "eval_rewards/chosen"
    rows = [dict(zip(("step", *names), (s, c, v, -v, v))) for s, c, v in zip(steps, chosen, loss)]
    return [rows[0], {"step": 1, "loss": 9.0, "logps/chosen": 9.0}, *rows[1:]]


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path):
    rows = [{"step": 0, "loss": 1.0}]
    runs = {
        "a": {"loss": "mio", "seed": 0, "beta": 1.0, "init": "out/base-seed0", "out": "out/a"},
        "b": {"loss": "mio", "seed": 1, "beta": 1.0, "init": "out/base-seed1", "log_every": 7},
        "c": {"loss": "mio", "seed": 1, "beta": 1.0, "init": "out/base-seed0"},  # another base
        "d": {"loss": "mio", "seed": 1, "beta": 1.0, "init": "out/base-seed12"},
        "e": {"loss": "mio", "seed": 2, "beta": 1.0, "init": "out/base-seed22"},
        "f": {"loss": "mio", "seed": 2, "beta": 0.5, "init": "out/base-seed2"},
        "g": {"loss": "mio", "seed": 2, "beta": 0.5, "init": "out/base-seed2", "split_seed": 1},
        "h": {"loss": "mio", "seed": 0, "beta": 0.5, "init": "out/base", "epochs": 1},
        "i": {"loss": "mio", "seed": 0, "beta": 0.5, "init": "out/base", "epochs": 2},
    }
    folders = {name: make_run(tmp_path / name, rows, **run) for name, run in runs.items()}
    groups = by_experiment(folders | {"no run": tmp_path})
    assert groups.pop("a") == [tmp_path / "a", tmp_path / "b"]
    assert groups == {name: [tmp_path / name] for name in "cdefghi"}


def test_curves_are_those_of_held_out_pairs_if_there_are_any(tmp_path):
    trained = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "logps/chosen": None}]
    folders = {
        "watched": make_run(tmp_path / "watched", held_out([0, 5], [-3, -2], [0.7, 0.6]), beta=1),
        "trained": make_run(tmp_path / "trained", trained, beta=2),
        "empty": make_run(tmp_path / "empty", [{"step": 1}], beta=3),
        "checkpoint": tmp_path,
    }
    found = {name: read_curves(folder) for name, folder in folders.items()}
    assert found["watched"]["loss"].tolist() == [[0, 5], [0.7, 0.6]]
    assert found["trained"].keys() == {"loss"} and found["empty"] == found["checkpoint"] == {}
    assert found["trained"]["loss"].tolist() == [[1, 2], [3.0, 2.0]]
    for bad in ({"eval_loss": 1.0}, {"step": 1, "eval_loss": "high"}):
        write_rows(folders["trained"] / "metrics.jsonl", [bad])
        with pytest.raises(ValueError, match="trained/metrics.jsonl: step and eval_loss must be"):
            read_curves(folders["trained"])


def test_plot_shows_the_mean_and_band_of_seeds_up_to_the_shortest_run(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {
        "a": (held_out([0, 10, 20], [-5.0, -4.0, -2.0], [1.0, 0.8, 0.6]), {"seed": 0}),
        "b": (held_out([0, 5, 15], [-10.0, -8.0, -6.0], [0.9, 0.7, 0.5]), {"seed": 1}),
        "c": (held_out([0, 20], [-1.0, -0.8], [0.8, 0.4]), {"seed": 2}),
        "other": (held_out([0, 30], [-3.0, -4.0], [0.5, 0.25]), {"seed": 0, "beta": 2.0}),
    }
    folders = {n: make_run(tmp_path / n, rows, **config) for n, (rows, config) in runs.items()}
    figure = plot(by_experiment(folders), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [axis.get_title() for axis in figure.axes] == list(PANELS)
    chosen, rejected, loss, rewards, *_ = figure.axes
    mean, other, zero = chosen.lines
    # The steps are those of run a up to 15, the last step of run b. At step 10 the changes are +1
    # in run a, +3 in run b (between +2 at step 5 and +4 at step 15) and +0.1 in run c.
    assert mean.get_xydata().tolist() == [[0, 0], [10, pytest.approx(4.1 / 3)]]
    assert other.get_xydata().tolist() == [[0, 0], [30, -1.0]]
    assert list(zero.get_ydata()) == [0, 0]
    (band,) = chosen.collections  # a single run has no band
    corners = set(map(tuple, np.round(band.get_paths()[0].vertices, 6).tolist()))
    assert corners == {(0.0, 0.0), (10.0, 0.1), (10.0, 3.0)}
    mean, other = loss.lines
    assert mean.get_xydata().tolist() == [[0, pytest.approx(0.9)], [10, pytest.approx(2 / 3)]]
    assert other.get_xydata().tolist() == [[0, 0.5], [30, 0.25]]
    thick, thin, *_ = rewards.lines
    assert thick.get_xydata().tolist() == mean.get_xydata().tolist()
    assert thin.get_ydata().tolist() == (-thick.get_ydata()).tolist()
    assert (thick.get_linewidth(), thin.get_linewidth()) == (2, 1)
    for number, line in enumerate((mean, other)):
        assert (line.get_color(), line.get_linestyle()) == (COLORS[number], STYLES[number])
    assert len(rejected.lines) == 1  # no run has this metric
    assert [text.get_text() for text in figure.legends[0].texts] == ["a (3 seeds)", "other"]


def test_labels_of_any_length_fit_in_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    names = [f"llama-3.2-1b-gsm8k-{loss}-beta0.2-lr1e-6-seed0" for loss in ("sft", "dpo", "mio")]
    rows = [{"step": step, "loss": 1.0} for step in range(2)]
    folders = {name: make_run(tmp_path / name, rows, loss=name) for name in names}
    figure = plot({name: [folder] for name, folder in folders.items()}, tmp_path / "curves.svg")
    assert [text.get_text() for text in figure.legends[0].texts] == names
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_groups_without_metrics_are_left_out_and_without_any_there_is_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "loss": 1.0} for step in range(2)]
    full, empty = make_run(tmp_path / "full", rows), make_run(tmp_path / "empty", [{"step": 0}])
    groups = {"some": [full, empty], "none": [empty, tmp_path]}
    figure = plot(groups, tmp_path / "curves.png")
    assert [text.get_text() for text in figure.legends[0].texts] == ["some"]
    with pytest.raises(ValueError, match="x.png: no run has metrics in metrics.jsonl; leave out"):
        plot({"none": [empty]}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
