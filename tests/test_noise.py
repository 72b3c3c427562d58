"""Named noise: known-answer vectors, names that mean the same everywhere, and the statistics of a normal."""

from __future__ import annotations

import hashlib
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from official import named_normal, philox_integers
from official import one_thread as one_thread
from scipy import stats

from ddim_lab.noise import INITIAL, NamedNoise, _words, philox4x32

SHAPES = [(1,), (3,), (4,), (5,), (1, 8, 8), (3, 7, 5), (3, 32, 32)]

# Random123's known answers for Philox4x32-10: counter, key -> words.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def draw(seed: int, indices: list[int], t: float, shape: tuple[int, ...]) -> torch.Tensor:
    like = torch.zeros(len(indices), *shape, dtype=torch.float64)
    return NamedNoise(seed)(torch.tensor(indices), t, like)


# -- the generator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox4x32([torch.tensor(c) for c in counter], key)) == words
    assert tuple(philox_integers(counter, key)) == words


def test_philox_equals_integer_arithmetic_on_many_counters() -> None:
    """Products of 32-bit words wrap in int64; every one of their 64 bits must still be right."""
    counters = np.random.default_rng(0).integers(0, 2**32, size=(4, 500))
    key = (0xDEADBEEF, 0x80000001)
    ours = torch.stack(philox4x32([torch.tensor(c) for c in counters], key)).T.tolist()
    assert ours == [philox_integers([int(c) for c in counter], key) for counter in counters.T]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("t", [INITIAL, 0, 999])
def test_every_element_is_the_normal_its_name_says(seed: int, t: int) -> None:
    indices = [0, 5, 4_000_000_000]
    z = draw(seed, indices, t, (11,))
    expected = [[named_normal(seed, i, t, j) for j in range(11)] for i in indices]
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_pinned_values() -> None:
    """A change here changes every image ever sampled: it belongs in the CHANGELOG."""
    z = NamedNoise(0).initial(torch.tensor([0, 1]), torch.zeros(2, 4, dtype=torch.float64))
    expected = [
        [0.9911376792540323, -0.9246625883905122, -0.6176089598118041, -0.48206858703542393],
        [1.0675901402660386, -0.4253441485124786, -2.3679730422173493, -0.2314968841282353],
    ]
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-12)


# -- a name means the same everywhere ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bitwise: alone, in batches of 2, 5 and 16, in another order, and as a subset."""
    count = 37
    noise, like = NamedNoise(5), torch.zeros(count, *shape, dtype=dtype)
    together = noise(torch.arange(count), 10, like)
    for size in (1, 2, 5, 16):
        parts = [noise(part, 10, like[: len(part)]) for part in torch.arange(count).split(size)]
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise(order, 10, like), together[order])
    subset = torch.tensor([36, 3, 3, 17])
    assert torch.equal(noise(subset, 10, like[:4]), together[subset])


def test_a_sample_does_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    like = torch.zeros(64, 3, 32, 32, dtype=torch.float64)
    try:
        torch.set_num_threads(1)
        one = NamedNoise(1)(torch.arange(64), 3, like)
        torch.set_num_threads(4)
        four = NamedNoise(1)(torch.arange(64), 3, like)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, four)


def test_a_longer_sample_begins_with_the_shorter_one() -> None:
    assert torch.equal(draw(2, [9], 4, (3, 5))[0].flatten(), draw(2, [9], 4, (64,))[0, :15])


def test_float32_is_float64_rounded() -> None:
    indices, double = torch.arange(16), torch.zeros(16, 3, 16, 16, dtype=torch.float64)
    noise = NamedNoise(11)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(noise(indices, 0, double.to(dtype)), noise(indices, 0, double).to(dtype))


def test_calls_leave_no_trace() -> None:
    """No state moves: not the source's, not torch's global generator."""
    noise, like, indices = NamedNoise(3), torch.zeros(4, 10), torch.arange(4)
    state = torch.get_rng_state()
    first = noise(indices, 7, like)
    noise(indices, 8, like)
    assert torch.equal(noise(indices, 7, like), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_same_in_another_process() -> None:
    code = (
        "import hashlib, torch; torch.set_num_threads(1); from ddim_lab.noise import NamedNoise;"
        "z = NamedNoise(2**40 + 1)(torch.arange(20), 500, torch.zeros(20, 3, 9, 9, dtype=torch.float64));"
        "print(hashlib.sha256(z.numpy().tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = draw(2**40 + 1, list(range(20)), 500, (3, 9, 9))
    assert hashlib.sha256(here.numpy().tobytes()).hexdigest() == there


# -- it is standard normal noise, and other names give other noise --------------------------------------------


@pytest.mark.parametrize("shape", [(100_000,), (1, 1), (3, 8, 8)])
def test_moments_and_distribution(shape: tuple[int, ...]) -> None:
    """Over elements and over samples; fixed seed, bounds at 4 standard errors."""
    count = max(1, 100_000 // math.prod(shape))
    z = draw(2024, list(range(count)), 12, shape).flatten().numpy()
    n = z.size
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1.0) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3.0) < 4 * math.sqrt(96 / n)
    assert stats.kstest(z, "norm").pvalue > 0.01


def test_tails_reach_as_far_as_stated() -> None:
    largest = math.sqrt(-2.0 * math.log(0.5 * 2.0**-32))
    assert largest == pytest.approx(6.7637, abs=1e-4)
    z = draw(1, list(range(64)), 0, (1 << 14,))
    assert 4.5 < float(z.abs().max()) <= largest


def test_neighbouring_names_are_independent() -> None:
    """Seed, index, timestep, element: no correlation, plain or of squares, beyond 4.5 standard errors."""
    n = 20_000
    base = draw(5, [1], 10, (n,))[0]
    others = {
        "seed": draw(6, [1], 10, (n,))[0],
        "seed's upper word": draw(5 + 2**32, [1], 10, (n,))[0],
        "index": draw(5, [2], 10, (n,))[0],
        "timestep": draw(5, [1], 11, (n,))[0],
        "x_T": draw(5, [1], INITIAL, (n,))[0],
        "index and timestep swapped": draw(5, [10], 1, (n,))[0],
        "next element": base.roll(1),
        "two elements on": base.roll(2),
        "four elements on": base.roll(4),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 4.5 / math.sqrt(n), name
        assert abs(np.corrcoef(base**2, other**2)[0, 1]) < 4.5 / math.sqrt(n), name


TIMES = [
    *(INITIAL, 0, 1, 2, 499, 500, 999),
    *(0.5, 1.5, 499.5, math.nextafter(500.0, 0.0), math.nextafter(500.0, 1000.0), 1e-30, 5e-324, 2.0**-1040),
    *(math.nextafter(2.0**-1022, 0.0), 2.0**-32, 998.9999389648438),
]


def test_no_two_times_share_noise() -> None:
    """A block of four elements is a function of its counter: no counter of one time is one of another's, be it whole,
    between two, or x_T's; for every block and sample, since the words beside them differ.
    """
    words = [_words(t) for t in TIMES]
    assert len(set(words)) == len(TIMES)
    for t, (label, sign) in zip(TIMES, words, strict=True):
        assert 0 <= label < 2**32
        assert (sign == 0) == (t == int(t))
        assert sign == 0 or 2**31 <= sign < 2**32
    for t in np.random.default_rng(0).uniform(0, 1000, 1000).tolist():  # the words say which t it is
        label, sign = _words(t)
        assert struct.unpack(">d", struct.pack(">II", sign, label)) == (-t,)


@pytest.mark.parametrize("element", [0, 1, 7])
def test_drawn_noise_is_not_that_of_another_time(element: int) -> None:
    """The first words of block 0, and of a block and a sample that are as large as the halves of another time's t."""
    z = torch.stack([draw(3, [0, 1, 5], t, (16,)) for t in TIMES])
    values = z.flatten(1)
    for i in range(len(TIMES)):
        for j in range(i):
            assert not set(values[i].tolist()) & set(values[j].tolist()), (TIMES[i], TIMES[j])
    assert float(values[:, element].std()) > 0.3


@pytest.mark.parametrize("t", [0.5, 499.5, 998.9999389648438])
def test_a_time_that_is_not_whole_is_named_by_its_bits(t: float) -> None:
    sign, label = struct.unpack(">II", struct.pack(">d", -t))
    words = philox_integers((0, label, 7, sign), (9, 0))
    a, b = words[:2]
    radius, angle = math.sqrt(-2.0 * math.log((a + 0.5) / 2**32)), 2.0 * math.pi * b / 2**32
    found = draw(9, [7], t, (2,))[0]
    np.testing.assert_allclose(found.numpy(), [radius * math.cos(angle), radius * math.sin(angle)], rtol=1e-12)


def test_a_whole_time_has_one_name_whatever_it_is_written_as() -> None:
    assert torch.equal(draw(2, [1], 5.0, (4,)), draw(2, [1], 5, (4,)))
    with pytest.raises(ValueError, match="names no noise"):
        draw(2, [1], -0.5, (4,))


def test_no_two_samples_are_alike() -> None:
    z = draw(0, list(range(5000)), INITIAL, (4,))
    assert len({tuple(row) for row in z.tolist()}) == 5000


# -- wrong input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_names_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        NamedNoise(seed)


def test_one_index_a_sample() -> None:
    with pytest.raises(ValueError, match="one index a sample"):
        NamedNoise(0)(torch.arange(3), 0, torch.zeros(4, 2))


# -- the same on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    """The words bitwise; float32 normals within one unit in the last place (log and cos differ in float64's last)."""
    rng = np.random.default_rng(1)
    counter = [torch.tensor(c) for c in rng.integers(0, 2**32, size=(4, 10_000))]
    on_cpu = philox4x32(counter, (1, 2**31))
    on_cuda = philox4x32([c.cuda() for c in counter], (1, 2**31))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_cuda, strict=True))

    like, indices, noise = torch.zeros(64, 3, 32, 32), torch.arange(64), NamedNoise(9)
    cpu, cuda = noise(indices, 5, like).numpy(), noise(indices, 5, like.cuda()).cpu().numpy()
    assert (np.abs(cpu - cuda) <= np.spacing(np.abs(cpu))).all()
    assert (cpu == cuda).mean() > 0.999
    one = noise(torch.tensor([3]), 5, like[:1].cuda())
    assert torch.equal(one[0].cpu(), torch.from_numpy(cuda[3]))
