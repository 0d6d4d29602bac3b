"""Writes a few of nano's scenes as PNG files, together with the questions about them.

python -m recipes.nano.write_scenes FOLDER
"""

import argparse
import json
import random
from pathlib import Path

from .scenes import CLUTTER, TYPES, draw_scene
from .talk import ask


def main() -> None:
    parser = argparse.ArgumentParser("python -m recipes.nano.write_scenes", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the files; made if it is missing")
    parser.add_argument("--count", type=int, default=6, help="number of scenes (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: 0)")
    split = "unseen scenes have clutter that training never showed, and any number (default: unseen)"
    parser.add_argument("--split", choices=CLUTTER, default="unseen", help=split)
    args = parser.parse_args()
    if args.folder.exists() and not args.folder.is_dir():
        parser.error(f"expected a folder to write to, {args.folder} is a file")
    if args.count < 1:
        parser.error(f"expected at least one scene, got --count {args.count}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for i in range(args.count):
        scene = draw_scene(args.seed, i, split=args.split)
        scene.image.save(args.folder / f"scene-{i}.png")
        asked = [ask(scene, kind, random.Random(i)) for kind in TYPES]
        turns = [{"question": q, "answer": a} for q, a in filter(None, asked)]
        (args.folder / f"scene-{i}.json").write_text(json.dumps(turns, indent=1))
    print(f"{args.count} scenes in {args.folder}")


if __name__ == "__main__":
    main()
