#!/usr/bin/env python3
"""Draws a run from its log.jsonl, also while it is still training.

    plot_run.py RUN                     writes RUN/plots/curves.png (loss, perplexity, learning
                                        rate) and RUN/plots/experts.png (expert load)
    plot_run.py RUN --out DIR           writes them elsewhere
    plot_run.py RUN --perplexity NAME   only prints the perplexity of the latest evaluation of
                                        that name: start, valid or end
    plot_run.py RUN --compare OTHER     only prints how far the training losses of two runs are
                                        apart, relative to OTHER's, at the steps that both logged

RUN is a run directory or a log.jsonl. The format of the log is described in train/report.h.
"""

import argparse
import json
import math
import sys
from pathlib import Path

MAX_ANNOTATED_EXPERTS = 12  # beyond that, numbers in the cells of the heat map overlap


class PlotError(Exception):
    """Something the user can correct; printed without a stack trace."""


def read_log(path):
    """The records of a log by kind: {"step": [...], "eval": [...], "event": [...], "ranks": ...}."""
    if path.is_dir():
        path = path / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise PlotError(f"{path}: no such file; expected a run directory or its log") from None
    except OSError as error:
        raise PlotError(f"{path}: cannot read: {error.strerror}") from None
    records = {"step": [], "eval": [], "event": [], "ranks": []}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record["kind"]].append(record)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            # The last line may be half written; anything else is worth a word.
            if number < len(lines):
                print(f"plot_run: {path}:{number}: not a record, left out", file=sys.stderr)
    return records


def series(records, key):
    """Steps and values of a key; NaN where the log says null."""
    steps = [record["step"] for record in records]
    values = [record.get(key) for record in records]
    return steps, [math.nan if value is None else float(value) for value in values]


def thousands(number):
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def draw_losses(axes, records):
    steps, values = series(records["step"], "cross_entropy")
    axes.plot(steps, values, color="tab:blue", linewidth=1, alpha=0.8, label="training")
    if records["eval"]:
        steps, values = series(records["eval"], "loss")
        axes.plot(steps, values, color="tab:orange", marker="o", markersize=4, linewidth=1.5,
                  label="held-out")
        for record, place in ((records["eval"][0], "first"), (records["eval"][-1], "last")):
            if record.get("perplexity") is None or (place == "last" and len(steps) == 1):
                continue
            axes.annotate(f"ppl {record['perplexity']:.4g}", (record["step"], record["loss"]),
                          textcoords="offset points", xytext=(6 if place == "first" else -6, 8),
                          ha="left" if place == "first" else "right", fontsize=9,
                          color="tab:orange")
    axes.margins(y=0.1)  # room for the annotations
    axes.set_ylabel("cross-entropy (nats / token)")
    axes.legend(loc="upper right")


def draw_skips(axes, records):
    skips = [event["step"] for event in records["event"] if event.get("event") == "skip"]
    for index, step in enumerate(skips):
        axes.axvline(step, color="tab:red", linewidth=0.8, alpha=0.5,
                     label="skipped step" if index == 0 else None)


def draw_curves(plt, records, title, path):
    """Losses above, learning rate and gradient norm below, over the same steps."""
    figure, (losses, rates) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 1.3), layout="constrained")
    figure.suptitle(title)
    draw_skips(losses, records)
    draw_losses(losses, records)
    rates.plot(*series(records["step"], "learning_rate"), color="tab:green", label="learning rate")
    rates.set_ylabel("learning rate", color="tab:green")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_ylim(bottom=0)
    rates.set_xlabel("step")
    norms = rates.twinx()
    norms.plot(*series(records["step"], "gradient_norm"), color="tab:gray", linewidth=0.8,
               alpha=0.7)
    norms.set_ylabel("gradient norm", color="tab:gray")
    norms.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def load_scale(plt, largest):
    """Colours for load / mean: white at 1 (balanced), blue below, red above."""
    return {"cmap": plt.get_cmap("RdBu_r").with_extremes(bad="lightgray"),
            "norm": plt.matplotlib.colors.TwoSlopeNorm(1, 0, max(2, largest))}


def draw_load_now(plt, figure, axes, record):
    """Layers x experts: each expert's share of its layer's assignments, over the mean share."""
    layers = record["experts"]
    width = max(len(layer["load"]) for layer in layers)
    cells = [[share * len(layer["load"]) for share in layer["load"]]
             + [math.nan] * (width - len(layer["load"])) for layer in layers]
    largest = max(value for row in cells for value in row if not math.isnan(value))
    image = axes.imshow(cells, aspect="auto", interpolation="nearest",
                        **load_scale(plt, largest))
    figure.colorbar(image, ax=axes, label="load / mean (1 = balanced)")
    axes.set_yticks(range(len(layers)), [layer["layer"] for layer in layers])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"expert load at step {record['step']}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if width > MAX_ANNOTATED_EXPERTS:
        return
    axes.set_xticks(range(width))
    for row, layer in enumerate(layers):
        for expert, share in enumerate(layer["load"]):
            value = cells[row][expert]
            text = "dead" if share == 0 else f"{100 * share:.0f}%"
            strong = value < 0.3 or value > 1 + 0.7 * (max(2, largest) - 1)
            axes.text(expert, row, text, ha="center", va="center", fontsize=7,
                      color="white" if strong else "black")


def draw_load_over_time(plt, figure, axes, records):
    """Layers x steps: the busiest expert's load over the mean."""
    layers = [layer["layer"] for layer in records[-1]["experts"]]
    rows = {layer: [math.nan] * len(records) for layer in layers}
    for column, record in enumerate(records):
        for layer in record["experts"]:
            if layer["layer"] in rows and layer["max_over_mean"] is not None:
                rows[layer["layer"]][column] = layer["max_over_mean"]
    cells = [rows[layer] for layer in layers]
    steps = [record["step"] for record in records]
    largest = max((value for row in cells for value in row if not math.isnan(value)), default=2)
    image = axes.imshow(cells, aspect="auto", interpolation="nearest",
                        extent=(steps[0], max(steps[-1], steps[0] + 1), len(layers) - 0.5, -0.5),
                        cmap=plt.get_cmap("magma_r").with_extremes(bad="lightgray"),
                        vmin=1, vmax=max(2, largest))
    figure.colorbar(image, ax=axes, label="busiest expert's load / mean")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    axes.set_title("busiest expert over time")


def draw_experts(plt, records, title, path):
    layers = len(records[-1]["experts"])
    figure, (now, over_time) = plt.subplots(
        1, 2, figsize=(13, max(3.5, 1.5 + 0.28 * layers)), layout="constrained")
    figure.suptitle(title)
    draw_load_now(plt, figure, now, records[-1])
    draw_load_over_time(plt, figure, over_time, records)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def import_pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")  # files only: no display needed
        import matplotlib.pyplot
    except ImportError as error:
        raise PlotError(f"{error}; run scripts/setup.sh and use .venv/bin/python") from None
    return matplotlib.pyplot


def plot(run, out):
    records = read_log(run)
    if not records["step"]:
        raise PlotError(f"{run}: the log has no training steps yet")
    plt = import_pyplot()
    directory = out or (run if run.is_dir() else run.parent) / "plots"
    name = (run if run.is_dir() else run.parent).resolve().name
    last = records["step"][-1]
    title = f"{name}: step {last['step']}, {thousands(last.get('tokens', 0))} tokens"
    written = [directory / "curves.png"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        draw_curves(plt, records, title, written[0])
        with_experts = [record for record in records["step"] if record.get("experts")]
        if with_experts:
            written.append(directory / "experts.png")
            draw_experts(plt, with_experts, title, written[1])
    except OSError as error:
        raise PlotError(f"{directory}: cannot write: {error.strerror}") from None
    for path in written:
        print(path)


def print_perplexity(run, name):
    records = read_log(run)["eval"]
    found = [record for record in records if record.get("name") == name]
    if not found or found[-1].get("perplexity") is None:
        names = sorted({str(record.get("name")) for record in records})
        raise PlotError(f"{run}: no evaluation named '{name}' with a finite perplexity, found: "
                        f"{', '.join(names) or 'none'}")
    print(f"{found[-1]['perplexity']:.2f}")


SMOOTHED_STEPS = 20  # the loss of a step is that of its own samples: a curve is a mean of several


def print_difference(run, other, at_most):
    """How far two runs' training losses are apart: the worst step, the mean, the worst mean, which
    may be `at_most` percent where that is given."""
    losses = [{record["step"]: record.get("cross_entropy") for record in read_log(path)["step"]}
              for path in (run, other)]
    steps = sorted(losses[0].keys() & losses[1].keys())
    if not steps:
        raise PlotError(f"{run} and {other} have logged no step in common")
    for path, values in zip((run, other), losses):
        missing = [step for step in steps if values[step] is None]
        if missing:
            raise PlotError(f"{path}: the loss of step {missing[0]} is not a number")
    apart = {step: abs(losses[0][step] / losses[1][step] - 1) for step in steps}
    worst = max(steps, key=apart.get)
    width = min(SMOOTHED_STEPS, len(steps))
    curves = [[sum(values[step] for step in steps[i:i + width])
               for i in range(len(steps) - width + 1)] for values in losses]
    smooth = max(abs(a / b - 1) for a, b in zip(*curves))
    print(f"at most {100 * apart[worst]:.2f} % apart, at step {worst} ({losses[0][worst]:.4f} "
          f"against {losses[1][worst]:.4f}); {100 * sum(apart.values()) / len(steps):.2f} % in the "
          f"mean; means of {width} at most {100 * smooth:.2f} %; {len(steps)} steps compared")
    if at_most is not None and not 100 * smooth <= at_most:
        raise PlotError(f"{run} and {other}: means of {width} steps are {100 * smooth:.2f} % "
                        f"apart, more than {at_most} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or a log.jsonl")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the pictures "
                        "(default: RUN/plots)")
    parser.add_argument("--perplexity", metavar="NAME",
                        help="print the perplexity of the latest evaluation NAME (start, valid, "
                        "end) and draw nothing")
    parser.add_argument("--compare", type=Path, metavar="OTHER",
                        help="print how far the training losses of RUN and OTHER are apart and draw "
                        "nothing")
    parser.add_argument("--at-most", type=float, metavar="PERCENT", help="with --compare: fail "
                        f"where means of {SMOOTHED_STEPS} steps are further apart")
    arguments = parser.parse_args()
    try:
        if arguments.compare:
            print_difference(arguments.run, arguments.compare, arguments.at_most)
        elif arguments.perplexity:
            print_perplexity(arguments.run, arguments.perplexity)
        else:
            plot(arguments.run, arguments.out)
    except PlotError as error:
        print(f"plot_run: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
