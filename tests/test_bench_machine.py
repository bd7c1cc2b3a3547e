"""The machine that `python -m entropy_kernels --bench` names."""

import pytest

from entropy_kernels._bench import machine
from entropy_kernels._bench.machine import Processor

X86 = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: A name\n\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd4f\n\n"


@pytest.mark.parametrize(
    ("text", "make", "slug"),
    [
        (X86.format("AuthenticAMD", 26, 2), "AMD Zen 5", "amd-zen-5"),
        (X86.format("AuthenticAMD", 25, 17), "AMD Zen 4", "amd-zen-4"),
        (X86.format("AuthenticAMD", 25, 1), "AMD Zen 3", "amd-zen-3"),
        (X86.format("GenuineIntel", 6, 143), "Intel Sapphire Rapids", "intel-sapphire-rapids"),
        (X86.format("GenuineIntel", 6, 999), "GenuineIntel 6 999", "genuineintel-6-999"),
        (X86.format("AuthenticAMD", 99, 2), "AuthenticAMD 99 2", "authenticamd-99-2"),
        (ARM, "Arm Neoverse V2", "arm-neoverse-v2"),
    ],
)
def test_the_make_comes_from_vendor_family_and_model(text, make, slug):
    """Virtual machines of a cloud hide the model's name."""
    found = machine.from_cpuinfo(text)
    assert (found.make, found.slug) == (make, slug)


def test_other_systems_and_older_files_have_a_make_too():
    windows = machine.from_windows("AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD")
    assert windows.slug == "amd-zen-4"
    assert machine.from_windows("something").slug == "something"
    assert Processor("Apple M2 Pro").slug == "apple-m2-pro"
    older = "AMD EPYC (family 26, model 2)"
    assert str(Processor.parse(older)) == older
    assert Processor.parse(older).slug == "amd-zen-5"
    assert Processor.parse("x86_64").slug == "x86-64"
