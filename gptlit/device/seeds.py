"""Seeds derived from (run seed, step, rank)."""

import torch


def mix(*numbers: int) -> int:
    """Derive one 63-bit seed from several numbers; neighbours give unrelated seeds (SplitMix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def seed_for_torch(seed: int) -> int:
    """Return the seed itself if it has 32 bits, and one derived from all of its bits if it has more.

    Of a longer one torch's generator on a CPU reads the last 32 bits only (`findings/torch-seed-of-32-bits.sh`).
    """
    return seed if 0 <= seed < 2**32 else mix(seed)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed only the generator that dropout uses; `torch.manual_seed` seeds all of them, which takes a millisecond."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "cpu":
        torch.random.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
