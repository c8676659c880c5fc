"""The training recipe: its data, its stages, the loop behind `v32 train`, and the table that shows what it is worth.

`TRAINED` is a checkpoint of the preset `mini` that has been through dense, warm-up and sparse stage, in fp32, on seed 0:

    v32 recipe --seeds 1 --no-faults --out runs/recipe      # leaves it in runs/recipe/weights/seed0/sparse
"""

from pathlib import Path

TRAINED = Path(__file__).parent / "mini"
