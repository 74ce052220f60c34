"""Lightning callbacks: checkpoints, metrics, samples, pictures, TensorBoard pages, progress bar, signals, averaging."""
