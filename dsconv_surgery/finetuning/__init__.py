"""Fine-tune a cut network to recover the accuracy that the cut cost."""
