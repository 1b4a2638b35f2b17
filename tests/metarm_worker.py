"""Stage 07 as it is, once per ZeRO stage in one launch, and each variant once (on two processes
the one that gathers, at ZeRO-3), for test_metarm.py: `metarm_worker.py FOLDER FLAGS...` leaves
FOLDER/ZERO.safetensors and FOLDER/VARIANT.safetensors."""
import shutil
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from lab import metarm_variants  # noqa: E402

folder, *flags = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]



def keep(name, target):
    if common.rank() == 0:
        shutil.copy(Path(flags[flags.index("--out") + 1]) / f"07_metarm/{name}/model.safetensors",
                    Path(folder) / f"{target}.safetensors")
    common.barrier()


for zero in range(4):
    import_module("07_metarm").main([*flags, "--zero", str(zero)])
    keep("round_1", zero)
for variant in metarm_variants.VARIANTS if common.world_size() == 1 else ("weights",):
    metarm_variants.main([*flags, "--variant", variant, "--zero", str(3 * common.world_size() - 3)])
    keep(variant, variant)
