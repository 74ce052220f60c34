"""What happens around training: checkpoints, curves, samples, the bar, signals."""
