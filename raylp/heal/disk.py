"""What checkpoints of a training take on disk, from the headers of the model's files."""

import math
from pathlib import Path

from raylp.heal.config import Heal
from raylp.models.checkpoint import numbered_tensors

KEPT = 4  # two checkpoints, the one that is being written, and its copy into place
WITH_OPTIMIZER = 16  # bytes of a weight that learns: itself, two moments and a copy in float32
WHOLE_STATE = 12  # and once more, for another number of workers: itself and two moments in float32
LOOKS = 4  # weights of looks at dev: the best, those in work, those that wait, and those that are being written


def trained_parameters(path: Path, heal: Heal) -> int:
    """How many numbers learn, about: adapters of every matrix of the decoder's layers, or the layers themselves."""
    shapes = [tensor["shape"] for tensor in numbered_tensors(path).values()]
    if heal.method == "full":
        return sum(math.prod(shape) for shape in shapes)
    return sum(heal.lora.rank * sum(shape) for shape in shapes if len(shape) == 2)


def checkpoint_bytes(path: Path, heal: Heal) -> int:
    """The most that checkpoints of one training take at a time; those of the next come after these are gone."""
    looks = 4 * LOOKS if heal.keep != "last" else 0
    portable = WHOLE_STATE if heal.zero_stage > 0 and heal.method != "full" else 0
    return trained_parameters(path, heal) * (KEPT * (WITH_OPTIMIZER + portable) + looks)
