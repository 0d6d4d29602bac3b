"""Formulas for the FLOP and the bytes of everything that the benchmark measures, each in one place.

FLOP are those of torch's FlopCounterMode: 2 for a multiply-add, products of matrices and convolutions only. Everything
else (LayerNorm, softmax, resizing, elementwise work, gathers) counts as bytes. Bytes are those of operators that run
one by one without a cache: each operator reads its inputs once, a gather reads what it gathers, and each writes its
outputs once; views are free. The formulas hold for a forward pass without autograd on a GPU.

A floor is the work that no form can do without: the FLOP of the cheapest form, and inputs, weights and outputs once.
"""
