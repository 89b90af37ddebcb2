"""`python -m vivace.training --out DIR [--resume]` trains the default model."""

from __future__ import annotations

import argparse
from pathlib import Path

from vivace.training.export import export
from vivace.training.recipe import TINY, TOY
from vivace.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vivace.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--recipe", choices=("tiny", "toy"), default="tiny")
    parser.add_argument("--until-step", type=int, help="stop there instead of at the recipe's end")
    parser.add_argument(
        "--check-every", type=int, default=250, help="steps between held-out checks"
    )
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the model of the run")
    options = parser.parse_args()
    recipe = {"tiny": TINY, "toy": TOY}[options.recipe]
    if options.export:
        export(Trainer(recipe, options.out, is_resumed=True), options.export)
        return
    trainer = Trainer(recipe, options.out, options.resume)
    trainer.run(options.until_step, check_every=options.check_every)


if __name__ == "__main__":
    main()
