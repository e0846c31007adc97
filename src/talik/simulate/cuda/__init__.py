"""CUDA's caching allocator and attention kernels, replayed."""
