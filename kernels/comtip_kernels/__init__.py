"""comtip_kernels: the operations CoMTIP spends its time in, each with a readable reference."""
