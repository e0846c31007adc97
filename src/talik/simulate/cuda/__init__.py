"""Replays CUDA's caching allocator and the choice of attention kernels. Not compared with a device yet."""
