"""Train a model: python train.py [CONFIG_FILE] [--key=value ...]; --help lists the keys."""

from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from nanolm.runs.folder import RUNS
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import start_run
from nanolm.system.config import load_config, run_script, split_arguments

DEFAULT = Path(__file__).parent / "config" / "pydocs.py"


def main(arguments: list[str]) -> None:
    files, _ = split_arguments(arguments, get_type_hints(TrainConfig))
    if not files:
        print(f"no config file given: training as config/{DEFAULT.name} says")
        files, arguments = [str(DEFAULT)], [str(DEFAULT), *arguments]
    config = load_config(TrainConfig, arguments)
    if config.out_dir is None:
        config = replace(config, out_dir=str(RUNS / Path(files[-1]).stem))
    start_run(config)


if __name__ == "__main__":
    run_script(main, __doc__, TrainConfig)
