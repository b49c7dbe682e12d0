"""The paper's experiments: ``python -m benchmarks.paper --data FOLDER --net cifar10``.

The networks of Grosse & Martens 2016 (arXiv:1602.01407) are trained on the official archives, which FOLDER holds:
momentum SGD with a searched learning rate, with and without an average of its iterates, beside KFC with this package's
defaults and with settings near the paper's. A training is a piece; after an interruption, the command continues.

**From the paper:** several times faster than carefully tuned SGD, in 10 to 20 times fewer iterations (its abstract);
batches of 512 for KFC and of 128 for SGD, and an exponential average of the iterates.

**From others:** the networks (:mod:`benchmarks.paper.networks`); SGD's momentum of 0.9 is cuda-convnet's.

**Assumed,** since the paper's text was not at hand: that these are its networks; the grids of learning rates; damping
0.001, KL clip 0.001, momentum 0.9 and decays of 0.95 (factors) and 0.99 (iterates) of "KFC, as the paper"; the epochs;
the training errors whose time is reported. There is no weight decay, schedule or augmentation, and weights and biases
have the same learning rate.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.devices import measured_on
from benchmarks.paper.archives import READERS
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.record import SEARCH_SEED, Record, markdown, next_run
from benchmarks.paper.training import CONTESTANTS, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, and write the tables.

    Returns:
        The exit status: 0 when all is done, 3 when pieces are left.
    """
    parser = parser_of_pieces(__doc__, plots=False)
    parser.prog = "python -m benchmarks.paper"
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the official archives are")
    parser.add_argument("--net", choices=NETWORKS, required=True, help="the data set and its network")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=50)
    parser.add_argument("--search-epochs", type=float, default=10, help="of each learning rate that is tried")
    parser.add_argument("--evaluations", type=int, default=100, help="how often the errors of a training are measured")
    parser.add_argument("--device", default="auto", help="Lightning's accelerator (default: one that there is)")
    options = parser.parse_args(arguments)
    if SEARCH_SEED in options.seeds:
        parser.error(f"seed {SEARCH_SEED} is the one of the search: take others.")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        data = READERS[options.net](options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    saved: Path = options.results / f"paper_{options.net}.json"
    record = Record(options.net, len(data.train_targets), len(data.test_targets))
    if saved.exists():
        earlier = Record.load(saved)
        if (earlier.training_examples, earlier.test_examples) != (record.training_examples, record.test_examples):
            parser.error(f"{saved} has trainings on other data: move it, or take another folder for --results.")
        if {run.epochs for run in earlier.runs} - {options.epochs, options.search_epochs}:
            parser.error(f"{saved} has trainings of other lengths: move it, or take another folder for --results.")
        record = earlier
    pieces = 0
    for name in options.contestants:
        contestant = CONTESTANTS[name]
        while run := next_run(record, name, contestant, options.seeds, options.epochs, options.search_epochs):
            if pieces == options.pieces:
                return 3
            print(f"==> {contestant.title}, lr {run.lr:g}, seed {run.seed}, {run.epochs:g} epochs", flush=True)
            device = train(
                data,
                NETWORKS[options.net],
                contestant,
                run,
                evaluations=options.evaluations,
                accelerator=options.device,
            )
            print(f"    training error {run.training_errors[-1]:.2%}, test error {run.test_errors[-1]:.2%}", flush=True)
            pieces += 1
            record.runs.append(run)
            record.measured_on = measured_on(device)
            record.save(saved)
            saved.with_suffix(".md").write_text(markdown(record, CONTESTANTS) + "\n", "utf-8")
    print(saved.with_suffix(".md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
