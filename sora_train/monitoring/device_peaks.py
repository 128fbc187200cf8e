"""How many floating-point operations a second a device could do at best, from its maker's data sheet."""

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets (SXM versions). The first name
# contained in the device's own decides.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device by its name, FLOP/s; None if it is not known."""
    words = device_name.replace("-", " ").split()
    return next(
        (
            peak
            for name, peak in PEAK_FLOPS.items()
            # Whole words: an "L4" is no "L40".
            if all(part in words for part in name.split())
        ),
        None,
    )
