"""What differs between CPU, GPU and several processes: seeds, memory, CUDA graphs, process groups."""
