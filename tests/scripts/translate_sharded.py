"""run_translation.py with sharded weights on a CPU; launched with fsdp.yaml by test_distributed.py."""

import sys

from accelerate.utils import DistributedType
from torch import distributed

import run_translation
from training.arguments import Arguments, parse_arguments


def parse_for_gpus(argv: list[str]) -> Arguments:
    """Parse, and tell accelerate that it is on GPUs, which it wants for sharding: nothing in its code needs one."""
    parsed = parse_arguments(argv)
    parsed.training.use_cpu = False
    parsed.training.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return parsed


if __name__ == "__main__":
    run_translation.parse_arguments = parse_for_gpus
    code = run_translation.main(sys.argv[1:])
    assert not distributed.is_initialized()
    sys.exit(code)
