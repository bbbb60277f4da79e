"""Train a model: python train.py [CONFIG_FILE ...] [--key=value ...]

Without a config file, it goes on with the run in --out_dir if --init_from says so, and otherwise
trains as config/pydocs.py says.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, just ends them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dataclasses import replace
from pathlib import Path

from nanolm.runs.folder import RUN_FILE, RUNS, recorded
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import start_run
from nanolm.system.config import load_config, split_arguments
from nanolm.system.script import run_script

DEFAULT = Path(__file__).parent / "config" / "pydocs.py"


def main(arguments: list[str]) -> None:
    files, given = split_arguments(TrainConfig, arguments)
    record = Path(given.get("out_dir") or "", RUN_FILE)
    if not files and given.get("init_from") in ("resume", "auto") and recorded(record.parent):
        print(f"no config file given: going on as {record} says")
        arguments = [str(record), *arguments]
    elif not files and given.get("init_from") == "resume" and "out_dir" in given:
        raise FileNotFoundError(f"no {record} to read: train there first, or name its config file")
    elif not files:
        print(f"no config file given: training as config/{DEFAULT.name} says")
        files, arguments = [str(DEFAULT)], [str(DEFAULT), *arguments]
    config = load_config(TrainConfig, arguments)
    if config.out_dir is None:
        config = replace(config, out_dir=str(RUNS / Path(files[-1]).stem))
    start_run(config)


if __name__ == "__main__":
    run_script(main, __doc__, TrainConfig, several=True)
