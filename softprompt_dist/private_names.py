"""Names of other libraries that they do not promise to keep, and that this package builds on.

A release that lacks one of them fails here by name. It could not be trusted to fail later: where a
parameter has no `ds_tensor`, say, it is taken for whole.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from softprompt_dist.errors import MachineError

TESTED_VERSIONS = {
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
}
"""The versions this release was tested with, as in constraints.txt."""

Names = Mapping[str, str]
PRIVATE_NAMES: Mapping[str, Names] = {
    "deepspeed": {
        "runtime/zero/partition_parameters.py": "_convert_to_deepspeed_param "
        "_convert_to_zero_parameters _zero_init_param all_gather all_gather_coalesced "
        "dp_world_size ds_id ds_numel ds_shape ds_tensor ds_zero_partition_rank "
        "ds_zero_partition_world_size local_device nvme_swapper partition NOT_AVAILABLE",
        "runtime/zero/stage3.py": "_reassign_or_swap_out_partitioned_parameters dp_process_group "
        "fp16_groups fp32_partitioned_groups_flat persistent_parameters release_backward_leftovers",
        "runtime/zero/stage_1_and_2.py": "bit16_groups bit16_groups_flat real_dp_process_group "
        "single_partition_of_fp32_groups update_lp_params",
        "runtime/bf16_optimizer.py": "bf16_groups fp32_groups_flat_partition update_lp_params",
        "runtime/swap_tensor/partitioned_param_swapper.py": "AsyncPartitionedParameterSwapper "
        "remove_partition_and_release_buffers swap_in",
        "utils/groups.py": "_WORLD_GROUP",
        "utils/tensor_fragment.py": "_hp_mapping hp_fragment_address lp_fragment_address",
    },
    "transformers": {
        "initialization.py": "no_init_weights",
        "modeling_utils.py": "_keys_to_ignore_on_load_unexpected _no_split_modules",
        "models/t5/modeling_t5.py": "_relative_position_bucket",
    },
}
"""Library -> file in it -> the names that the file must speak of."""


def missing_names(library: str, folder: Path | None = None) -> list[str]:
    """`FILE: NAME` of each that an installed library lacks; nothing of it is imported.

    Args:
        library: one of `PRIVATE_NAMES`.
        folder: where it is installed; found by itself if left out.
    """
    if folder is None:
        spec = importlib.util.find_spec(library)
        folder = Path(str(spec and spec.origin)).parent
    missing = []
    for file, names in PRIVATE_NAMES[library].items():
        path = folder / file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        words = set(re.findall(r"\w+", text))
        missing += [f"{file}: {name}" for name in names.split() if name not in words]
    return missing


def assert_known(library: str) -> None:
    """Refuse a release of a library that lacks what this package builds on.

    Raises:
        MachineError: with the names, and the version that has them.
    """
    missing = missing_names(library)
    if missing:
        found, tested = importlib.metadata.version(library), TESTED_VERSIONS[library]
        raise MachineError(
            f"{library} {found} lacks {', '.join(missing)}, which this release builds on. Install "
            f"the version it was tested with: pip install {library}=={tested}."
        )
