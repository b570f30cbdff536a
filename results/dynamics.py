"""Makes results/dynamics.md and .png: python results/dynamics.py

How far held-out chosen and rejected log-probs move over four epochs, under mio and dpo, on a grid
of learning rates and betas, dpo's beta half of mio's so that both start with the same gradient.
"""

import json
from pathlib import Path

from pool import ROOT, provenance, train_all

LOSSES = {"mio": 1.0, "dpo": 0.5}  # and the beta that `scale` multiplies
SCALES, RATES, SEED, EPOCHS = (0.25, 1.0, 4.0), (3e-5, 1e-4, 3e-4), 0, 4
COLORS = {"mio": "#0072B2", "dpo": "#D55E00"}

TEXT = """# Where do chosen log-probs fall?

**Question.** DPO's chosen log-prob is said to fall late in training and MIO's not to: on this task,
at which learning rates and betas?

**Expected before the run.** DPO's falls more with more steps and larger steps, and rises at small
ones; MIO's rises at all, for its pull on the chosen grows as the chosen falls.

`python results/dynamics.py`: {provenance}. Seed {seed} alone,
{epochs} epochs, {pairs} held-out pairs; change of the summed log-prob, nats, at the end and at its
lowest.

![Curves](dynamics.png)

{table}

**What it shows.** The chosen log-prob ends below its start in {fell_dpo} of {cells} settings under
dpo and in {fell_mio} of {cells} under mio; at its lowest it is below by more than 0.1 nats in
{dipped_dpo} and {dipped_mio}. The rejected one falls further under dpo in {further} of {cells}.

**What it does not show.** One seed, one small task; standard errors of single figures are 0.03 to
0.2 nats (see demonstration.md).
"""


def curve(folder: str, side: str) -> tuple[list[int], list[float]]:
    rows = [json.loads(line) for line in (ROOT / folder / "metrics.jsonl").read_text().splitlines()]
    points = [(r["step"], r[f"eval_logps/{side}"]) for r in rows if f"eval_logps/{side}" in r]
    return [step for step, _ in points], [value - points[0][1] for _, value in points]


def draw(outs: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 3, figsize=(9, 7.5), sharex=True, layout="constrained")
    for row, scale in zip(axes, SCALES):
        for axis, rate in zip(row, RATES):
            for loss in LOSSES:
                for side, width in (("chosen", 2.2), ("rejected", 1.0)):
                    steps, values = curve(outs[loss, scale, rate], side)
                    look = {"color": COLORS[loss], "linestyle": "-" if loss == "mio" else "--"}
                    axis.plot(steps, values, linewidth=width, label=f"{loss}, {side}", **look)
            axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
            axis.set_yscale("symlog", linthresh=1)
            betas = " and ".join(f"{beta * scale:g}" for beta in LOSSES.values())
            axis.set_title(f"lr {rate:g}, beta {betas}", fontsize=9)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step")
    figure.supylabel("change of held-out log-prob, nats (linear up to 1, then logarithmic)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


def main() -> None:
    outs = {
        (loss, scale, rate): f"out/demonstration/seed{SEED}/dynamics/{loss}-{scale:g}-{rate:g}"
        for loss in LOSSES for scale in SCALES for rate in RATES
    }  # fmt: skip
    base = f"out/demonstration/seed{SEED}/base"
    files = ["--init", base, "--data", f"{base}/pairs.jsonl"]
    files += ["--eval_data", f"{base}/heldout_pairs.jsonl", "--batch_size", "64"]
    jobs = {
        out: ["--loss", loss, "--beta", str(LOSSES[loss] * scale), "--lr", str(rate), *files,
              "--epochs", str(EPOCHS), "--seed", str(SEED), "--max_length", "96"]
        for (loss, scale, rate), out in outs.items()
    }  # fmt: skip
    made = train_all(jobs)
    draw(outs)
    ends = {key: {side: curve(out, side)[1] for side in ("chosen", "rejected")}
            for key, out in outs.items()}  # fmt: skip
    lines = ["| lr | beta of mio, dpo | mio: chosen (lowest) | dpo: chosen (lowest) "
             "| mio: rejected | dpo: rejected |", "|---|---|---|---|---|---|"]  # fmt: skip
    cells = [(rate, scale) for rate in RATES for scale in SCALES]
    for rate, scale in cells:
        mine = [ends[loss, scale, rate] for loss in LOSSES]
        chosen = [f"{e['chosen'][-1]:+.2f} ({min(e['chosen']):+.2f})" for e in mine]
        rejected = [f"{e['rejected'][-1]:+.2f}" for e in mine]
        lines.append(f"| {rate:g} | {scale * LOSSES['mio']:g}, {scale * LOSSES['dpo']:g} | "
                     f"{' | '.join(chosen + rejected)} |")  # fmt: skip

    def count(test) -> int:
        return sum(test(*(ends[loss, scale, rate] for loss in LOSSES)) for rate, scale in cells)

    summary = next(iter(made.values()))["summary"]["table"]
    text = TEXT.format(
        provenance=provenance(made),
        seed=SEED,
        epochs=EPOCHS,
        table="\n".join(lines),
        cells=len(cells),
        pairs=next(row["Δ chosen"]["n"] for row in summary.values() if "Δ chosen" in row),
        fell_mio=count(lambda mio, dpo: mio["chosen"][-1] < 0),
        fell_dpo=count(lambda mio, dpo: dpo["chosen"][-1] < 0),
        dipped_mio=count(lambda mio, dpo: min(mio["chosen"]) < -0.1),
        dipped_dpo=count(lambda mio, dpo: min(dpo["chosen"]) < -0.1),
        further=count(lambda mio, dpo: dpo["rejected"][-1] < mio["rejected"][-1]),
    )
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
