"""How a layer reads its past: mixers, channel mixers, norms, and the kernels under them."""
