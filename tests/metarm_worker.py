"""Stage 07 as it is, once per ZeRO stage in one launch, for test_metarm.py: `metarm_worker.py
FOLDER FLAGS...` leaves
FOLDER/ZERO.safetensors."""
import shutil
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402

folder, *flags = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
for zero in range(4):
    import_module("07_metarm").main([*flags, "--zero", str(zero)])
    if common.rank() == 0:
        shutil.copy(Path(flags[flags.index("--out") + 1]) / "07_metarm/round_1/model.safetensors",
                    Path(folder) / f"{zero}.safetensors")
    common.barrier()
