"""Arrays in, arrays out: the byte format, its reference and its fast forms.

What is computed, in torch operations: ``spec`` and ``widths`` (a quantizer, lowered), ``random``
(noise), ``arithmetic`` (formulas of a bucket), ``packing``, ``reference`` (the definition of every
byte), and apart from buckets ``averages``, ``derivatives``, ``few_bit``, ``masks``. ``dispatch``
chooses a form of it by device.

Compiled for CPUs, by numba: ``cpu`` (buckets) and ``cpu_whole`` (large ones) are called by ``dispatch``;
``cpu_kernels`` is their source, ``cpu_calls`` its C functions; ``averages_cpu``, ``derivatives_cpu``,
``few_bit_cpu``, ``masks_cpu``. ``compiling`` says how they are compiled, ``threads`` who runs them.

For CUDA, by Triton: ``gpu``, whose source is ``gpu_kernels``.
"""
