"""Fine-tunes Mini-Gemini: stage 1, stage 2, LoRA or QLoRA, as one YAML file says.

python -m recipes.finetune CONFIG.yaml                                       # on one device
accelerate launch --config_file FILE.yaml -m recipes.finetune CONFIG.yaml    # on several

A run that was stopped continues with the same command. docs/training.md lists the keys of the file;
recipes/finetune/configs has files for all models, and recipes/finetune/accelerate those for FSDP and deepspeed.
"""

import argparse
import logging
import os
from pathlib import Path

from mg_fast.errors import MgFastError

from .config import ConfigError, read_config


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="replace a value of the file, as in --set lora.rank=8; may be given several times",
    )
    parser.add_argument("--check", action="store_true", help="read all samples with their pictures, and train nothing")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # A tokenizer must not start threads before a loader forks its workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        changes = {}
        for change in args.changes:
            key, equals, value = change.partition("=")
            if not equals:
                raise ConfigError(f"--set: expected KEY=VALUE, got {change!r}")
            changes[key.strip()] = value
        config = read_config(args.config, changes)
        # The libraries of the training take seconds to import, so a wrong configuration is told before.
        if args.check:
            from .prepare import check_samples

            broken, samples = check_samples(config)
            print(f"{samples:,} samples, {broken:,} of them broken: {config.output / 'checked.jsonl'}")
        else:
            from .run import fine_tune

            folder = fine_tune(config)
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"written to {folder}")
    except (MgFastError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
