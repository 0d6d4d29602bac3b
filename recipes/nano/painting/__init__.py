"""The painter in the package: a small text-to-image pipeline in the layout of SDXL, trained on nano's own scenes."""
