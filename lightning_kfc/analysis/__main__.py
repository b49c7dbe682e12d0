"""``python -m lightning_kfc.analysis``: the tables, and with ``--out`` the plots, of the demo net."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_kfc.analysis.compare import compare_curvature
from lightning_kfc.analysis.demo import train_demo
from lightning_kfc.analysis.plots import draw_block_spectra, draw_errors
from lightning_kfc.analysis.space import spatial_statistics
from lightning_kfc.pictures import check_matplotlib, draw_autocorrelation, draw_factors, draw_spectra, svg


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the demo net, measure, print, draw."""
    parser = argparse.ArgumentParser(prog="python -m lightning_kfc.analysis", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of its training")
    parser.add_argument("--examples", type=int, default=128, help="digits to look at it with")
    parser.add_argument("--damping", type=float, default=0.01, help="of the preconditioned gradients")
    parser.add_argument("--max-parameters", type=int, default=2000, help="larger layers are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="a folder for the text and the plots, as SVG; needs the extra 'pictures'"
    )
    options = parser.parse_args(arguments)
    if options.out is not None:
        check_matplotlib("--out")

    demo = train_demo(steps=options.steps, examples=options.examples, seed=options.seed)
    comparison = compare_curvature(
        demo.model, demo.loss, damping=options.damping, max_parameters=options.max_parameters
    )
    space = spatial_statistics(demo.model, demo.loss)
    text = (
        f"Demo net after {options.steps} steps of KFC, training loss {demo.training_loss:.3f};\n"
        f"exact Fisher blocks of {options.examples} digits that it has not seen.\n\n{comparison}\n\n"
        f"Over space, with all outcomes of every digit:\n{space}"
    )
    print(text)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "curvature.txt").write_text(f"{text}\n", encoding="utf-8")
    figures = {
        "curvature_spectra": draw_block_spectra(comparison),
        "curvature_errors": draw_errors(comparison),
        "curvature_autocorrelation": draw_autocorrelation(space.statistics),
        "factor_spectra": draw_spectra(demo.spectra),
        "factors": draw_factors(demo.factors),
    }
    for name, figure in figures.items():
        path = options.out / f"{name}.svg"
        path.write_text(svg(figure), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
